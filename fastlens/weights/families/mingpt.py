"""minGPT in TransformerLens' own format: Othello-GPT."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.families.neel import FAMILY as NEEL
from fastlens.weights.family import Family, Key
from fastlens.weights.views import bias_heads, input_heads, output_heads, transposed


def _positions(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor[0, : cfg.n_ctx]


B, T = "blocks.{l}.", "blocks.{l}.attn."
_HEADS = {"query": "Q", "key": "K", "value": "V"}
KEYS: dict[str, Key | None] = {
    "tok_emb.weight": Key("d_vocab d_model", "embed.W_E"),
    "pos_emb": Key("1 n_ctx d_model", "pos_embed.W_pos", _positions),
    **{f"{T}{theirs}.weight": Key("heads d_model", f"{T}W_{x}", input_heads)
       for theirs, x in _HEADS.items()},
    **{f"{T}{theirs}.bias": Key("heads", f"{T}b_{x}", bias_heads) for theirs, x in _HEADS.items()},
    T + "proj.weight": Key("d_model heads", T + "W_O", output_heads),
    T + "proj.bias": Key("d_model", T + "b_O"),
    T + "mask": None,
    **{f"{B}{n}.{theirs}": Key("d_model", f"{B}{n}.{ours}")
       for n in ("ln1", "ln2") for theirs, ours in (("weight", "w"), ("bias", "b"))},
    B + "mlp.0.weight": Key("d_mlp d_model", B + "mlp.W_in", transposed),
    B + "mlp.0.bias": Key("d_mlp", B + "mlp.b_in"),
    B + "mlp.2.weight": Key("d_model d_mlp", B + "mlp.W_out", transposed),
    B + "mlp.2.bias": Key("d_model", B + "mlp.b_out"),
    "ln_f.weight": Key("d_model", "ln_final.w"),
    "ln_f.bias": Key("d_model", "ln_final.b"),
    "head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    assert NEEL.derive is not None
    return {**NEEL.derive(config), "normalization_type": "LN"}


FAMILY = Family(
    name="mingpt",
    architectures=("mingpt",),
    config_class="PretrainedConfig",
    prefix="",
    config=NEEL.config,
    fixed={},
    derive=_fields,
    reads=NEEL.reads - {"normalization", "normalization_type", "shortformer_pos"},
    only={**NEEL.only, "normalization": "LN", "normalization_type": "LN", "shortformer_pos": False},
    keys=KEYS,
    aliases={"othello-gpt": "Baidicoot/Othello-GPT-Transformer-Lens"},
)
