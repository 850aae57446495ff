"""TransformerLens' tables of model names, made from what `fastlens.weights.families` knows.

They hold all of TransformerLens' names but those of speech models, and more. Any other hub name,
folder or GGUF file of a known architecture can be loaded as well.
"""

from fastlens.weights.names import known_names


def _aliases() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, official in known_names().items():
        found.setdefault(official, [])
        if name != official:
            found[official].append(name)
    return found


MODEL_ALIASES: dict[str, list[str]] = {name: also for name, also in _aliases().items() if also}
OFFICIAL_MODEL_NAMES: list[str] = sorted(_aliases())
# One short name per model.
DEFAULT_MODEL_ALIASES: list[str] = [
    (MODEL_ALIASES.get(name) or [name])[0] for name in OFFICIAL_MODEL_NAMES
]
