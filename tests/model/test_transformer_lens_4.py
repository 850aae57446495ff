"""A fastlens model is a `TransformerLensModel` of TransformerLens 4, whose tools then take it.

The protocol is written down here as 4.3.0 has it, since the tests compare with version 3.9. Give
``FASTLENS_TL4_PYTHON`` an interpreter that has transformer-lens 4 to run its tools as well.
"""

import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytest

from fastlens import HookedTransformer
from tests.models import ours

SCRIPT = Path(__file__).with_name("with_transformer_lens_4.py")
ANY = "self, *args, **kwargs"
MODEL = {"cfg": "property", "run_with_cache": ANY, "run_with_hooks": ANY, "to_tokens": ANY}
# transformer_lens.model_protocol of 4.3.0.
PROTOCOLS = {
    "TransformerLensModel": MODEL,
    "TrainableTransformerLensModel": {
        "parameters": ANY, "train": ANY, "to": ANY, "state_dict": ANY, "__call__": ANY,
    },
    "TransformerLensModelWithWeights": {
        **MODEL, "blocks": "property", "ln_final": "property", "accumulated_bias": ANY,
        "to_single_token": ANY, "tokens_to_residual_directions": ANY,
    },
}  # fmt: skip

# How 4.3.0's patching, head_detector and ActivationCache call these: positional, keywords.
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("run_with_hooks", (None,), {"fwd_hooks": []}),
    ("run_with_cache", (None,), {"remove_batch_dim": True}),
    ("to_tokens", ("text",), {}),
    ("accumulated_bias", (1, True), {"include_mlp_biases": True}),
    ("to_single_token", (" the",), {}),
    ("tokens_to_residual_directions", (5,), {}),
    ("set_use_attn_in", (False,), {}),
    ("set_use_split_qkv_input", (True,), {}),
]
# What they read of cfg and the blocks.
CFG = (
    "attn_only d_mlp d_model device final_rms n_heads n_key_value_heads n_layers "
    "normalization_type use_attn_in use_split_qkv_input"
)
BLOCKS = "attn.W_O attn.b_O ln1 ln2 mlp.W_out mlp.b_out"


@runtime_checkable
class WithWeights(Protocol):
    """`TransformerLensModelWithWeights` of 4.3.0."""

    @property
    def cfg(self) -> Any: ...
    @property
    def blocks(self) -> Any: ...
    @property
    def ln_final(self) -> Any: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
    def accumulated_bias(self, *args: Any, **kwargs: Any) -> Any: ...
    def to_single_token(self, *args: Any, **kwargs: Any) -> Any: ...
    def tokens_to_residual_directions(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "attn_only"])
def test_every_member_is_there(name, protocol):
    model = ours(name)
    for member, kind in PROTOCOLS[protocol].items():
        # Python 3.12 and beartype look without calling __getattr__, where submodules would hide.
        found = inspect.getattr_static(model, member)
        if kind == ANY:
            assert inspect.isfunction(found), member
        else:
            assert isinstance(found, property) or member == "cfg", member
            assert getattr(model, member) is not None


def test_the_protocol_written_out_is_satisfied():
    assert set(PROTOCOLS["TransformerLensModelWithWeights"]) == {
        member for member in vars(WithWeights) if not member.startswith("_")
    }
    assert isinstance(ours("gpt2"), WithWeights)
    assert not hasattr(ours("no_norm"), "ln_final")


@pytest.mark.parametrize(("method", "args", "kwargs"), CALLS, ids=[call[0] for call in CALLS])
def test_methods_take_what_its_tools_pass(method, args, kwargs):
    inspect.signature(getattr(HookedTransformer, method)).bind(None, *args, **kwargs)


def test_config_and_blocks_have_what_its_tools_read():
    model = ours("gpt2")
    for field in CFG.split():
        assert hasattr(model.cfg, field), field
    for path in BLOCKS.split():
        part = model.blocks[0]
        for step in path.split("."):
            part = getattr(part, step)


def test_its_own_tools_give_our_values():
    python = os.environ.get("FASTLENS_TL4_PYTHON")
    if not python:
        pytest.skip("FASTLENS_TL4_PYTHON names no interpreter with transformer-lens 4")
    result = subprocess.run(
        [python, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-1] == "ok done", result.stderr[-3000:]
    members = next(line for line in lines if line.startswith("members "))
    assert json.loads(members.removeprefix("members ")) == PROTOCOLS
    assert sum(line.startswith("ok patching.") for line in lines) > 60
