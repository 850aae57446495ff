"""TransformerLens' own toy models: attention-only, GELU and SoLU ones, Redwood's two layers."""

from collections.abc import Callable
from typing import Any

from fastlens.weights.family import Family, Key
from fastlens.weights.views import first_positions

NORMED = ("LN", "RMS")


def _norm(config: dict[str, Any]) -> str | None:
    return config.get("normalization", config.get("normalization_type", "LN"))


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    stated = [config.get(name) for name in ("ln_eps", "eps", "layer_norm_eps")]
    return {
        "normalization_type": _norm(config),
        "positional_embedding_type": "shortformer" if config.get("shortformer_pos") else "standard",
        "eps": next((eps for eps in stated if eps is not None), 1e-5),
    }


def _has_mlp(config: dict[str, Any]) -> bool:
    return not config.get("attn_only", False)


def _gain(config: dict[str, Any]) -> bool:
    return _norm(config) in NORMED


def _shift(config: dict[str, Any]) -> bool:
    return _norm(config) == "LN"


def _both(*conditions: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    return lambda config: all(condition(config) for condition in conditions)


def _has(bias: str) -> Callable[[dict[str, Any]], bool]:
    """TransformerLens fills biases that a file lacks with zeros."""
    return lambda config: bias in config.get("biases", [bias])


def _final_shift(config: dict[str, Any]) -> bool:
    return _shift(config) and not config.get("final_rms", False)


def _activation_norm(config: dict[str, Any]) -> bool:
    return _has_mlp(config) and _shift(config) and str(config.get("act_fn")).endswith("_ln")


def _same(name: str, axes: str, when: Any = None, **rest: Any) -> dict[str, Key]:
    return {name: Key(axes, name, when=when, **rest)}


B, A, M = "blocks.{l}.", "blocks.{l}.attn.", "blocks.{l}.mlp."
KEYS: dict[str, Key | None] = {
    **_same("embed.W_E", "d_vocab d_model"),
    **_same("pos_embed.W_pos", "n_ctx d_model", view=first_positions),
    **_same(B + "ln1.w", "d_model", _gain),
    **_same(B + "ln1.b", "d_model", _shift),
    **{name: key for x in "QKV" for name, key in (
        _same(f"{A}W_{x}", "n_heads d_model d_head")
        | _same(f"{A}b_{x}", "n_heads d_head", _has(f"attn.b_{x}"))).items()},
    **_same(A + "W_O", "n_heads d_head d_model"),
    **_same(A + "b_O", "d_model", _has("attn.b_O")),
    # Tables that today's TransformerLens makes when it needs them.
    A + "mask": None,
    A + "IGNORE": None,
    **_same(B + "ln2.w", "d_model", _both(_has_mlp, _gain)),
    **_same(B + "ln2.b", "d_model", _both(_has_mlp, _shift)),
    **_same(M + "W_in", "d_model d_mlp", _has_mlp),
    **_same(M + "b_in", "d_mlp", _both(_has_mlp, _has("mlp.b_in"))),
    **_same(M + "ln.w", "d_mlp", _activation_norm),
    **_same(M + "ln.b", "d_mlp", _activation_norm),
    **_same(M + "W_out", "d_mlp d_model", _has_mlp),
    **_same(M + "b_out", "d_model", _both(_has_mlp, _has("mlp.b_out"))),
    **_same("ln_final.w", "d_model", _gain),
    **_same("ln_final.b", "d_model", _final_shift),
    **_same("unembed.W_U", "d_model d_vocab"),
    **_same("unembed.b_U", "d_vocab", _has("unembed.b_U")),
}  # fmt: skip

_NEW = [f"Attn_Only_{n}L512W" for n in (1, 2, 3, 4)] + [f"GELU_{n}L512W" for n in (1, 2, 3, 4)]
_NEW += [f"SoLU_{size}W" for size in ("1L512", "2L512", "3L512", "4L512", "6L768", "8L1024",
                                      "10L1280", "12L1536")]  # fmt: skip
_OLD = {"1L": 9, "2L": 10, "4L": 11, "6L": 13, "8L": 21, "10L": 22, "12L": 23}
ALIASES = {
    "redwood_attn_2l": "ArthurConmy/redwood_attn_2l",
    **dict.fromkeys(
        [f"attn-only-{kind}" for kind in
         ("2l-demo", "2l-shortformer-6b-big-lr", "2l-induction-demo", "demo")],
        "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr"),
    **{f"{size.lower().split('512')[0].replace('_', '-')}{end}": f"NeelNanda/{size}_C4_Code"
       for size in _NEW[:8] for end in ("", "-new", "-c4-code")},
    **{f"solu-{size[5:].lower().split('l')[0]}l{end}": f"NeelNanda/{size}_C4_Code"
       for size in _NEW[8:] for end in ("", "-new", "-c4-code")},
    **{f"solu-{size.lower()}-{end}": f"NeelNanda/SoLU_{size}_v{version}_old"
       for size, version in _OLD.items() for end in ("pile", "old")},
    **{f"solu-{n}l-{end}": f"NeelNanda/SoLU_{n}L512W_Wiki_Finetune"
       for n in (1, 4) for end in ("wiki", "wiki-finetune", "finetune")},
}  # fmt: skip


def _checkpoints(repository: str) -> tuple[str, list[int]] | None:
    """No revisions: files of the repository, which are listed to find the steps."""
    return ("", []) if repository.startswith("NeelNanda/") else None


FAMILY = Family(
    name="neel",
    architectures=("neel", "neel-solu-old"),
    config_class="PretrainedConfig",
    prefix="",
    config={
        **{name: (name, None) for name in ("d_vocab", "d_model", "d_mlp", "n_layers", "n_heads",
                                           "d_head", "n_ctx")},
        "act_fn": ("act_fn", "relu"),
        "attn_only": ("attn_only", False),
        "final_rms": ("final_rms", False),
    },
    fixed={},
    derive=_fields,
    reads=frozenset("""normalization normalization_type shortformer_pos ln_eps eps layer_norm_eps
        tokenizer_name biases""".split()),
    # Of the training code: factors of activations, which no released model has.
    only={"neuron_scale": 1.0, "neuron_temp": 1.0},
    keys=KEYS,
    aliases=ALIASES,
    checkpoints=_checkpoints,
)  # fmt: skip
