"""The errors fastlens raises. Each says what was asked, what was found and what to do.

Classes also inherit from the built-in that TransformerLens raised in the same place
(``KeyError``, ``AssertionError``, ``ValueError``), so existing ``except`` clauses keep working.
"""

import difflib
from collections.abc import Iterable


class FastlensError(Exception):
    """Base of every error that fastlens raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print repr(message); show the sentence itself.
        return str(self.args[0]) if self.args else ""


class ConfigError(FastlensError, ValueError):
    """A config field is unknown, missing, or contradicts another."""


class HookNameError(FastlensError, KeyError):
    """A hook name or names filter matches no hook point of the model."""


class FlagError(FastlensError, AssertionError):
    """A hook point is switched off by a config flag."""


class ModelNameError(FastlensError, ValueError):
    """No model of that name, folder or file can be found."""


class SourceError(FastlensError, OSError):
    """A weights file or folder cannot be read: missing, truncated, corrupt or unwritable."""


class WeightsError(FastlensError, ValueError):
    """Tensors do not fit the model: unknown, missing or of the wrong shape."""


class ShapeError(FastlensError, ValueError, AssertionError, RuntimeError):
    """A tensor argument has the wrong shape. TransformerLens raises any of the three for this."""


class LayerError(FastlensError, IndexError):
    """A layer number that the model does not have."""


class TokenError(FastlensError, AssertionError, ValueError):
    """Text does not tokenize as the call needs, or the model has no tokenizer."""


class MetricError(FastlensError, ValueError):
    """A metric returned something that is neither a scalar nor ``[batch]``, or NaN."""


class SweepError(FastlensError, ValueError):
    """A patching sweep cannot run as asked."""


class PatchIndexError(SweepError, AssertionError, IndexError, KeyError):
    """An index of TransformerLens' patching functions: out of range, of the wrong length, or along
    axes that are not known. TransformerLens raises any of the four for this."""


class SiteError(FastlensError, IndexError):
    """A table of sites names a place that the activation does not have, or names one twice."""


class EditedError(FastlensError, RuntimeError):
    """A captured tensor was written to, and an entry that is computed from it is read."""


class GradientError(FastlensError, RuntimeError):
    """A gradient was asked for through something that passes none on."""


class StreamError(FastlensError, RuntimeError):
    """Something was asked of a model whose weights are streamed that needs them all in memory."""


class MemoryLimitError(FastlensError, MemoryError):
    """What was asked cannot be done within ``max_memory``; says the smallest that would do."""


class MissingDependencyError(FastlensError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The ``n`` options that look most like ``name``, best first (difflib ratio)."""
    options = list(dict.fromkeys(options))
    found = difflib.get_close_matches(name, options, n=n, cutoff=0.5)
    if len(found) < n:
        # A short name inside a long one ("hook_zz", "gpt2") scores low as a whole.
        tails = {option.rsplit(".", 1)[-1].rsplit("/", 1)[-1]: option for option in options}
        for tail in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=n, cutoff=0.6):
            if tails[tail] not in found:
                found.append(tails[tail])
    return found[:n]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`` Nearest: 'a', 'b'.`` with a leading space, or an empty string if nothing is near."""
    found = nearest(name, options)
    return f" Nearest: {', '.join(map(repr, found))}." if found else ""
