"""GPT-NeoX: Pythia and its training checkpoints, GPT-NeoX-20B, StableLM alpha."""

from typing import Any

from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError
from fastlens.weights.family import Family, Gguf, Key
from fastlens.weights.gguf_file import GgufReader
from fastlens.weights.rope import rotary_fields
from fastlens.weights.views import output_heads, transposed


def _qkv(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    """``[(head qkv d_head), d_model]``: each head's q, k and v lie together."""
    return tensor.view(cfg.n_heads, 3, cfg.d_head, -1).permute(1, 0, 3, 2).unbind(0)


def _qkv_bias(tensor: Tensor, cfg: HookedTransformerConfig) -> tuple[Tensor, ...]:
    return tensor.view(cfg.n_heads, 3, cfg.d_head).transpose(0, 1).unbind(0)


def _heads_together(tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """llama.cpp stores all q, then all k, then all v."""
    heads = config["num_attention_heads"]
    apart = tensor.view(3, heads, -1, *tensor.shape[1:])
    return apart.transpose(0, 1).reshape(tensor.shape)


# Second names of the base and the rotated share, which transformers 4.46 to 4.57 wrote.
_UNREAD = {"rope_theta", "partial_rotary_factor"}


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    d_head = config.get("hidden_size", 6144) // config.get("num_attention_heads", 64)
    rotary = rotary_fields(
        config,
        d_head,
        config.get("max_position_embeddings", 2048),
        theta_name="rotary_emb_base",
        fraction=config.get("rotary_pct", 0.25),
    )
    base, share = config.get("rope_theta"), config.get("partial_rotary_factor")
    if base not in (None, rotary["rotary_base"]) or (
        share is not None and int(d_head * share) != rotary["rotary_dim"]
    ):
        raise ConfigError(
            f"the config has rope_theta={base} and partial_rotary_factor={share}. transformers "
            f"reads neither: it takes {rotary['rotary_base']} and {rotary['rotary_dim']} of "
            f"{d_head} channels from rotary_emb_base and rotary_pct. Give both what is meant."
        )
    return {"d_head": d_head, **rotary}


def _gguf_rotary(reader: GgufReader) -> dict[str, Any]:
    known = {key.removeprefix("gptneox."): value for key, value in reader.metadata.items()}
    d_head = known["embedding_length"] // known["attention.head_count"]
    return {"rotary_pct": known["rope.dimension_count"] / d_head}


def _checkpoints(repository: str) -> tuple[str, list[int]] | None:
    if not repository.startswith("EleutherAI/pythia"):
        return None
    # The first release (v0) has no checkpoints before step 1000.
    early = [] if "v0" in repository else [0, *(2**n for n in range(10))]
    return "step{}", [*early, *range(1000, 143001, 1000)]


SWITCH = "attention_bias"
A, T = "layers.{l}.attention.", "blocks.{l}.attn."
M, N = "layers.{l}.mlp.", "layers.{l}.post_attention_layernorm."
KEYS = {
    "embed_in.weight": Key("d_vocab d_model", "embed.W_E"),
    "layers.{l}.input_layernorm.weight": Key("d_model", "blocks.{l}.ln1.w"),
    "layers.{l}.input_layernorm.bias": Key("d_model", "blocks.{l}.ln1.b"),
    A + "query_key_value.weight": Key("qkv d_model", (T + "W_Q", T + "W_K", T + "W_V"), _qkv),
    A + "query_key_value.bias": Key("qkv", (T + "b_Q", T + "b_K", T + "b_V"), _qkv_bias, SWITCH),
    A + "dense.weight": Key("d_model heads", T + "W_O", output_heads),
    A + "dense.bias": Key("d_model", T + "b_O", when=SWITCH),
    **dict.fromkeys((A + "bias", A + "masked_bias", A + "rotary_emb.inv_freq")),
    N + "weight": Key("d_model", "blocks.{l}.ln2.w"),
    N + "bias": Key("d_model", "blocks.{l}.ln2.b"),
    M + "dense_h_to_4h.weight": Key("d_mlp d_model", "blocks.{l}.mlp.W_in", transposed),
    M + "dense_h_to_4h.bias": Key("d_mlp", "blocks.{l}.mlp.b_in"),
    M + "dense_4h_to_h.weight": Key("d_model d_mlp", "blocks.{l}.mlp.W_out", transposed),
    M + "dense_4h_to_h.bias": Key("d_model", "blocks.{l}.mlp.b_out"),
    "final_layer_norm.weight": Key("d_model", "ln_final.w"),
    "final_layer_norm.bias": Key("d_model", "ln_final.b"),
    "lm_head.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
    # Its name until transformers 5.14.
    "embed_out.weight": Key("d_vocab d_model", "unembed.W_U", transposed),
}  # fmt: skip
# None in eval mode.
DROPOUT = """attention_dropout hidden_dropout classifier_dropout attention_probs_dropout_prob
hidden_dropout_prob""".split()

# Pythia sizes were once counted with other parameters; TransformerLens keeps the old names.
_SIZES = {"14m": None, "31m": None, "70m": "19m", "160m": "125m", "410m": "350m", "1b": "800m",
          "1.4b": "1.3b", "2.8b": "2.7b", "6.9b": "6.7b", "12b": "13b"}  # fmt: skip
ALIASES = {
    **dict.fromkeys(("gpt-neox-20b", "gpt-neox", "neox"), "EleutherAI/gpt-neox-20b"),
    "pythia": "EleutherAI/pythia-70m",
    "pythia-v0": "EleutherAI/pythia-70m-v0",
    **{f"stablelm-{kind}{alpha}-{size}": f"stabilityai/stablelm-{kind}-alpha-{size}"
       for kind in ("base", "tuned") for size in ("3b", "7b") for alpha in ("", "-alpha")},
}  # fmt: skip
for _new, _old in _SIZES.items():
    _kinds = ["", *(["-deduped", "-v0", "-deduped-v0"] if _old else [])]
    for _kind in _kinds + (["-seed1", "-seed2", "-seed3"] if _new == "160m" else []):
        _repository = f"EleutherAI/pythia-{_new}{_kind}"
        _names = [f"pythia-{_new}{_kind}", *([f"pythia-{_old}{_kind}"] if _old else [])]
        ALIASES |= dict.fromkeys((*_names, f"EleutherAI/{_names[-1]}"), _repository)

_BLOCK = {"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value",
          "attn_output": "attention.dense", "ffn_norm": "post_attention_layernorm",
          "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}  # fmt: skip
GGUF = Gguf(
    config={"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads", "rope.freq_base": "rotary_emb_base",
            "attention.layer_norm_epsilon": "layer_norm_eps",
            "use_parallel_residual": "use_parallel_residual"},
    names={"token_embd": "embed_in", "output_norm": "final_layer_norm", "output": "embed_out",
           **{f"blk.{{l}}.{theirs}": f"layers.{{l}}.{ours}" for theirs, ours in _BLOCK.items()}},
    undo=dict.fromkeys((A + "query_key_value.weight", A + "query_key_value.bias"), _heads_together),
    derive=_gguf_rotary,
    reads=("rope.dimension_count",),
)  # fmt: skip

FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    config_class="GPTNeoXConfig",
    prefix="gpt_neox.",
    config={
        "vocab_size": ("d_vocab", 50432),
        "hidden_size": ("d_model", 6144),
        "num_hidden_layers": ("n_layers", 44),
        "num_attention_heads": ("n_heads", 64),
        "intermediate_size": ("d_mlp", 24576),
        "hidden_act": ("act_fn", "gelu"),
        "max_position_embeddings": ("n_ctx", 2048),
        "layer_norm_eps": ("eps", 1e-5),
        "use_parallel_residual": ("parallel_attn_mlp", True),
    },
    fixed={"normalization_type": "LN"},
    derive=_rotary,
    reads=frozenset({"rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base", *_UNREAD}),
    switches={SWITCH: True},
    ignored=frozenset(DROPOUT),
    keys=KEYS,
    aliases=ALIASES,
    default_prepend_bos=False,
    checkpoints=_checkpoints,
    gguf={"gptneox": GGUF},
)
