"""GPT-2, and what shares its architecture: DistilGPT-2, Stanford's replications, mGPT."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.family import Family, Gguf, Key
from fastlens.weights.views import first_positions, transposed


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[d_model, (qkv head d_head)]``: GPT-2's Conv1D is stored ``[in, out]``."""
    return tensor.view(cfg.d_model, 3, cfg.n_heads, cfg.d_head).permute(1, 2, 0, 3).unbind(0)


def _qkv_bias(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    return tensor.view(3, cfg.n_heads, cfg.d_head).unbind(0)


def _output_heads(tensor: Tensor, cfg: HookedTransformerConfig) -> Tensor:
    return tensor.view(cfg.n_heads, cfg.d_head, cfg.d_model)


def _head_size(config: dict[str, Any]) -> dict[str, Any]:
    return {"d_head": config.get("n_embd", 768) // config.get("n_head", 12)}


def _conv1d(tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """llama.cpp stores Conv1D weights ``[out, in]``."""
    return tensor.t()


def _checkpoints(repository: str) -> tuple[str, list[int]] | None:
    if not repository.startswith("stanford-crfm/"):
        return None
    steps = [*range(0, 100, 10), *range(100, 2000, 50), *range(2000, 20000, 100)]
    return "checkpoint-{}", [*steps, *range(20000, 400001, 1000)]


A, T = "h.{l}.attn.", "blocks.{l}.attn."
KEYS = {
    "wte.weight": Key("d_vocab d_model", "embed.W_E"),
    "wpe.weight": Key("n_ctx d_model", "pos_embed.W_pos", first_positions),
    "h.{l}.ln_1.weight": Key("d_model", "blocks.{l}.ln1.w"),
    "h.{l}.ln_1.bias": Key("d_model", "blocks.{l}.ln1.b"),
    A + "c_attn.weight": Key("d_model qkv", (T + "W_Q", T + "W_K", T + "W_V"), _qkv),
    A + "c_attn.bias": Key("qkv", (T + "b_Q", T + "b_K", T + "b_V"), _qkv_bias),
    A + "c_proj.weight": Key("heads d_model", T + "W_O", _output_heads),
    A + "c_proj.bias": Key("d_model", T + "b_O"),
    A + "bias": None,
    A + "masked_bias": None,
    "h.{l}.ln_2.weight": Key("d_model", "blocks.{l}.ln2.w"),
    "h.{l}.ln_2.bias": Key("d_model", "blocks.{l}.ln2.b"),
    "h.{l}.mlp.c_fc.weight": Key("d_model d_mlp", "blocks.{l}.mlp.W_in"),
    "h.{l}.mlp.c_fc.bias": Key("d_mlp", "blocks.{l}.mlp.b_in"),
    "h.{l}.mlp.c_proj.weight": Key("d_mlp d_model", "blocks.{l}.mlp.W_out"),
    "h.{l}.mlp.c_proj.bias": Key("d_model", "blocks.{l}.mlp.b_out"),
    "ln_f.weight": Key("d_model", "ln_final.w"),
    "ln_f.bias": Key("d_model", "ln_final.b"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}

# Five seeds each; TransformerLens also calls them a to e.
_STANFORD = {
    "small": "alias-{}-x21 battlestar-{}-x49 caprica-{}-x81 darkmatter-{}-x343 expanse-{}-x777",
    "medium": "arwen-{}-x21 beren-{}-x49 celebrimbor-{}-x81 durin-{}-x343 eowyn-{}-x777",
}
_RUNS = [
    (f"{size}-{letter}", repository.format(f"gpt2-{size}"))
    for size, repositories in _STANFORD.items()
    for letter, repository in zip("abcde", repositories.split(), strict=True)
]
ALIASES = {
    "gpt2-small": "gpt2",
    **dict.fromkeys(("distillgpt2", "distill-gpt2", "distil-gpt2", "gpt2-xs"), "distilgpt2"),
    "mGPT": "ai-forever/mGPT",
    **{f"stanford-gpt2-{run}": f"stanford-crfm/{repo}" for run, repo in _RUNS},
    **{f"gpt2-stanford-{run}": f"stanford-crfm/{repo}" for run, repo in _RUNS},
    **{f"gpt2-mistral-{run}": f"stanford-crfm/{repo}" for run, repo in _RUNS[:5]},
    # "medium-small" is TransformerLens' name for the medium runs.
    **{f"gpt2-medium-small-{run[-1]}": f"stanford-crfm/{repo}" for run, repo in _RUNS[5:]},
    **{repo: f"stanford-crfm/{repo}" for _, repo in _RUNS},
}

_BLOCK = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
          "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
GGUF = Gguf(
    config={"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
            "feed_forward_length": "n_inner", "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon"},
    names={"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head",
           **{f"blk.{{l}}.{theirs}": f"h.{{l}}.{ours}" for theirs, ours in _BLOCK.items()}},
    undo=dict.fromkeys((A + "c_attn.weight", A + "c_proj.weight", "h.{l}.mlp.c_fc.weight",
                        "h.{l}.mlp.c_proj.weight"), _conv1d),
)  # fmt: skip

FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    config_class="GPT2Config",
    prefix="transformer.",
    config={
        "vocab_size": ("d_vocab", 50257),
        "n_positions": ("n_ctx", 1024),
        "n_embd": ("d_model", 768),
        "n_layer": ("n_layers", 12),
        "n_head": ("n_heads", 12),
        "n_inner": ("d_mlp", None),
        "activation_function": ("act_fn", "gelu_new"),
        "layer_norm_epsilon": ("eps", 1e-5),
        "scale_attn_weights": ("use_attn_scale", True),
        "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
    },
    fixed={"normalization_type": "LN", "positional_embedding_type": "standard"},
    derive=_head_size,
    ties_by_default=True,
    only={"add_cross_attention": False},
    # No dropout in eval mode; the upcast changes rounding in half precision only.
    ignored=frozenset(
        """resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn summary_type summary_use_proj
        summary_activation summary_proj_to_labels summary_first_dropout n_special
        predict_special_tokens""".split()
    ),
    keys=KEYS,
    aliases=ALIASES,
    repositories=("gpt2-medium", "gpt2-large", "gpt2-xl"),
    checkpoints=_checkpoints,
    gguf={"gpt2": GGUF},
)
