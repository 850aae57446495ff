"""Error classes read as sentences, are caught as TransformerLens' built-ins, and suggest names."""

import pytest

from fastlens import errors


def test_a_key_error_prints_its_sentence_not_its_repr():
    assert str(errors.HookNameError("no hook 'a'")) == "no hook 'a'"
    assert str(errors.FastlensError()) == ""


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (errors.HookNameError, KeyError),
        (errors.FlagError, AssertionError),
        (errors.TokenError, AssertionError),
        (errors.ConfigError, ValueError),
        (errors.SourceError, OSError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_existing_except_clauses_keep_working(ours, builtin):
    with pytest.raises(builtin):
        raise ours("sentence")
    assert issubclass(ours, errors.FastlensError)


def test_near_names():
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_q", "blocks.0.hook_resid_pre", "ln_final"]
    assert errors.nearest("blocks.0.attn.hook_zz", names)[0] == "blocks.0.attn.hook_z"
    assert errors.nearest("hook_resid_per", names) == ["blocks.0.hook_resid_pre"]
    assert errors.did_you_mean("xyzzy", names) == ""
    assert errors.did_you_mean("ln_finl", names) == " Nearest: 'ln_final'."
