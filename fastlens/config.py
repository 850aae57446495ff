"""`HookedTransformerConfig`: TransformerLens 3's config, field for field."""

import dataclasses
import pprint
import random
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import torch

from fastlens.devices import get_device
from fastlens.errors import ConfigError, did_you_mean

ACTIVATIONS = (
    "relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "solu", "solu_ln",
    "xielu", "relu2",
)  # fmt: skip
NORMS = (None, "LN", "LNPre", "RMS", "RMSPre")
POSITIONS = ("standard", "rotary", "shortformer", "alibi", "relative_positional_bias")
INIT_MODES = (
    "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP",
)  # fmt: skip
SOFTCAP_OFF = -1.0
QK_NORMS = ("head", "joined", "layer_norm", "shared_layer_norm", "behind_rotary")
# TransformerLens knows these two mechanisms by the architecture's name.
NORM_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_JOINED_QK_NORM = (*NORM_AFTER, "OlmoeForCausalLM")


@dataclass(frozen=True)
class EncoderConfig:
    """How an encoder differs from BERT, whose values are the defaults. `HookedEncoder` reads it.

    Attributes:
        pre_norm: Blocks are `TransformerBlock`s, and ``ln_final`` stands behind the last.
        n_token_types: Rows of the token type embedding; 0 for none.
        d_embed: Width of the embeddings where it is projected to ``d_model`` behind their norm.
        padding_id: Positions count the tokens that are not this one, from ``padding_id + 1``
            (RoBERTa). By default they count all columns from 0.
        heads: The parts behind the last block: ``mlm_head`` (with ``unembed``), ``pooler``,
            ``nsp_head``, ``rtd_head``.
        head_act_fn: The activation of ``mlm_head``; by default ``act_fn``.
        embedding_norm: Whether the sum of the embeddings is normalised.
        first_norm: Whether a pre-norm encoder's first attention has a norm before it.
        shared_layers: Whether all blocks have the parameters of the first (ALBERT).
        dropped_token: The mask token of an encoder that embeds it as zeros, and scales the other
            tokens as if 12 % of them had been masked, as in its training (ESM-2).
        zeroes_padding: Whether padding is embedded as zeros.
    """

    pre_norm: bool = False
    n_token_types: int = 2
    d_embed: int | None = None
    padding_id: int | None = None
    heads: tuple[str, ...] = ("mlm_head", "nsp_head", "pooler")
    head_act_fn: str | None = None
    embedding_norm: bool = True
    first_norm: bool = True
    shared_layers: bool = False
    dropped_token: int | None = None
    zeroes_padding: bool = False


@dataclass(repr=False)
class HookedTransformerConfig:
    """What fixes a model's shape and arithmetic. Names and defaults are TransformerLens'.

    >>> cfg = HookedTransformerConfig(n_layers=2, d_model=64, d_head=16, n_ctx=32, d_vocab=100,
    ...                               act_fn="gelu", device="cpu")
    >>> cfg.n_heads, cfg.d_mlp, cfg.attn_scale
    (4, 256, 4.0)

    Mutable, as in TransformerLens: flags such as ``use_attn_result`` may be flipped between runs.
    Derived fields (``n_heads``, ``d_mlp``, ``d_vocab_out``, ``rotary_dim``, ``attn_scale``,
    ``initializer_range``, ``n_params``, ``device``) are filled in at construction. ``n_params``
    counts attention and MLP matrices only (Kaplan et al. 2020), not embeddings, biases or norms.

    These fields are not TransformerLens':
    ``norm_after_sublayer``: ln1 and ln2 normalise what attention and MLP write, not what they read
    (OLMo-2, OLMo-3, Exaone-4). ``qk_norm_kind``: with ``use_qk_norm``, "head" is an RMS norm of
    every head with one gain for all (Qwen-3, Gemma-3), "joined" one RMS norm over the channels of
    all heads (OLMo-2, OLMoE), "layer_norm" a LayerNorm of every head with gains of its own and no
    bias (Cohere, StableLM), "shared_layer_norm" one with a gain and a bias for all heads
    (Persimmon), "behind_rotary" the first one after the rotation (HunYuan). ``rotary_layers``:
    which layers rotate queries and keys; None is all of them (SmolLM-3, Cohere-2 and Exaone-4 have
    layers without positions). ``longrope_*``: what each rotary frequency is divided by in texts up
    to ``longrope_original_ctx_len`` tokens, and in longer ones, and what sine and cosine are
    multiplied with (Ding et al. 2402.13753; Phi-3, Phi-4-mini).
    ``encoder``: how an encoder differs from BERT.

    Of mixtures of experts: ``softmax_after_top_k``: over the chosen experts alone, not over all.
    ``expert_biases``: router and experts have biases. ``expert_glu_limit``: experts compute
    ``(up + 1) * gate * sigmoid(expert_glu_alpha * gate)``, both factors clamped (these three are
    GPT-OSS', set by its ``original_architecture``). ``d_shared_expert``: width of an expert that
    all tokens pass; ``gates_shared_expert``: what it writes is scaled by a sigmoid (Qwen-2-MoE).

    Of DeepSeek's mixtures: ``router_scores``, ``expert_groups``, ``groups_per_token`` and
    ``expert_weight_scale``: see `GroupedRouterMoE`. ``n_dense_layers``: the first layers have one
    gated MLP of width ``d_mlp_dense``; ``d_mlp`` is an expert's.

    Of latent attention (DeepSeek): ``d_kv_latent`` and ``d_q_latent``: widths of the latents of
    keys with values, and of queries. ``d_value``: channels of a head's value and z; None is d_head.

    Raises: ConfigError for values that contradict each other.
    """

    d_model: int
    d_head: int
    n_layers: int
    n_ctx: int
    n_heads: int = -1
    d_mlp: int | None = None
    d_vocab: int = -1
    device: str | torch.device | None = None
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    default_prepend_bos: bool = True
    positional_embedding_type: str = "standard"
    n_key_value_heads: int | None = None
    attn_only: bool = False
    gated_mlp: bool = False
    uses_rms_norm: bool = False
    eps: float | int = 1e-5
    layer_norm_folding: bool = False
    act_fn: str | None = "relu"
    normalization_type: str | None = "LN"
    num_experts: int | None = None
    experts_per_token: int | None = None
    final_rms: bool = False
    dtype: torch.dtype = torch.float32
    model_name: str = "custom"
    use_attn_scale: bool = True
    attn_scale: float | int = -1.0
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_qk_norm: bool = False
    clip_qkv: float | int | None = None
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    use_dynamic_ntk_rope: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    n_devices: int = 1
    attention_dir: str = "causal"
    seed: int | None = None
    initializer_range: float | int = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    tokenizer_prepends_bos: bool | None = None
    post_embedding_ln: bool = False
    rotary_base: float | int = 10000
    rotary_base_local: float | int | None = None
    rotary_scaling_factor: float | int = 1.0
    trust_remote_code: bool = False
    rotary_adjacent_pairs: bool = False
    load_in_4bit: bool = False
    quantization_method: str | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float | int = SOFTCAP_OFF
    output_logits_soft_cap: float | int = SOFTCAP_OFF
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float | int = 1.0
    NTK_by_parts_high_freq_factor: float | int = 4.0
    NTK_by_parts_factor: float | int = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float | int = 1.0
    yarn_attention_factor: float | int = 1.0
    yarn_beta_fast: float | int = 32.0
    yarn_beta_slow: float | int = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    use_attention_sinks: bool = False
    norm_topk_prob: bool = False
    # From here on: what TransformerLens' config has no field for.
    norm_after_sublayer: bool = False
    qk_norm_kind: str = "head"
    rotary_layers: list[bool] | None = None
    longrope_short_factor: list[float] | None = None
    longrope_long_factor: list[float] | None = None
    longrope_original_ctx_len: int = 4096
    longrope_attention_factor: float | int = 1.0
    encoder: EncoderConfig | None = None
    softmax_after_top_k: bool = False
    expert_biases: bool = False
    expert_glu_limit: float | int | None = None
    expert_glu_alpha: float | int = 1.702
    d_shared_expert: int | None = None
    gates_shared_expert: bool = False
    router_scores: str = "softmax"
    expert_groups: int | None = None
    groups_per_token: int | None = None
    expert_weight_scale: float | int = 1.0
    n_dense_layers: int = 0
    d_mlp_dense: int | None = None
    d_kv_latent: int | None = None
    d_q_latent: int | None = None
    d_value: int | None = None

    def __post_init__(self) -> None:
        self._fill_sizes()
        self._check()
        if self.seed is not None:
            self.set_seed_everywhere(self.seed)

    def _fill_sizes(self) -> None:
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise ConfigError(
                    f"n_heads was not given and d_model={self.d_model} is not a multiple of "
                    f"d_head={self.d_head}. Give n_heads."
                )
            self.n_heads = self.d_model // self.d_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        self._name_mechanisms()
        if self.original_architecture == "GptOssForCausalLM":
            self.softmax_after_top_k = self.expert_biases = True
            self.expert_glu_limit = 7.0 if self.expert_glu_limit is None else self.expert_glu_limit
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.initializer_range < 0:
            gpt2_like = 0.8 / float(np.sqrt(self.d_model))
            self.initializer_range = gpt2_like if self.init_mode == "gpt2" else 1.0
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = float(np.sqrt(self.d_head))
        if self.device is None:
            self.device = get_device()
        self.n_params = self.n_layers * self._attention_weights()
        if not self.attn_only:
            mlp = self.d_model * self.d_mlp * (2 + self.gated_mlp)
            dense = self.n_dense_layers if self.num_experts else 0
            if dense:
                wide = self.d_model * (self.d_mlp_dense or self.d_mlp) * (2 + self.gated_mlp)
                self.n_params += dense * wide
            if self.num_experts:
                mlp = (mlp + self.d_model) * self.num_experts
            self.n_params += (self.n_layers - dense) * mlp

    def _attention_weights(self) -> int:
        """Numbers in the matrices of one layer's attention."""
        if self.d_kv_latent is None:
            return self.d_model * self.d_head * self.n_heads * 4
        rotary, d_value = self.rotary_dim or 0, self.d_value or self.d_head
        queries = self.n_heads * self.d_head
        if self.d_q_latent is None:
            queries *= self.d_model
        else:
            queries = self.d_q_latent * (self.d_model + queries)
        keys = self.n_heads * (self.d_head - rotary + d_value) + self.d_model
        output = self.n_heads * d_value * self.d_model
        return queries + self.d_kv_latent * keys + self.d_model * rotary + output

    def _name_mechanisms(self) -> None:
        """Say in fields what TransformerLens knows by the architecture's name."""
        if self.original_architecture in NORM_AFTER:
            self.norm_after_sublayer = True
        if self.original_architecture in _JOINED_QK_NORM:
            self.use_qk_norm, self.qk_norm_kind = True, "joined"

    def _check(self) -> None:
        self._check_one_of("normalization_type", NORMS)
        self._check_one_of("positional_embedding_type", POSITIONS)
        self._check_one_of("init_mode", INIT_MODES)
        self._check_one_of("attention_dir", ("causal", "bidirectional"))
        self._check_one_of("qk_norm_kind", QK_NORMS)
        self._check_one_of("router_scores", ("softmax", "sigmoid"))
        if self.qk_norm_kind == "behind_rotary" and self.positional_embedding_type != "rotary":
            raise ConfigError(
                f"qk_norm_kind='behind_rotary' was asked with positional_embedding_type="
                f"{self.positional_embedding_type!r}. It needs 'rotary'."
            )
        if self.rotary_layers is not None and len(self.rotary_layers) < self.n_layers:
            raise ConfigError(
                f"rotary_layers has {len(self.rotary_layers)} entries for {self.n_layers} layers."
            )
        if self.longrope_short_factor is not None or self.longrope_long_factor is not None:
            self._check_longrope()
        if not self.attn_only:
            self._check_one_of("act_fn", ACTIVATIONS)
        groups = self.n_key_value_heads
        if groups is not None and (groups <= 0 or self.n_heads % groups):
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_key_value_heads={groups}."
            )
        if self.use_local_attn and (self.window_size is None or self.attn_types is None):
            raise ConfigError("use_local_attn=True needs window_size and attn_types (one a layer).")
        if self.use_local_attn and len(self.attn_types or ()) < self.n_layers:
            raise ConfigError(
                f"attn_types has {len(self.attn_types or ())} entries for {self.n_layers} layers."
            )
        if (self.num_experts is None) != (self.experts_per_token is None):
            raise ConfigError("num_experts and experts_per_token go together: give both or none.")
        if self.num_experts and not 0 < (self.experts_per_token or 0) <= self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} must be 1 to num_experts="
                f"{self.num_experts}."
            )
        if self.n_devices < 1:
            raise ConfigError(f"n_devices={self.n_devices} must be at least 1.")
        if self.n_devices > 1 and torch.cuda.device_count() < self.n_devices:
            raise ConfigError(
                f"n_devices={self.n_devices} spreads layers over that many GPUs, and there are "
                f"{torch.cuda.device_count()}. Leave n_devices=1."
            )

    def _check_longrope(self) -> None:
        n = (self.rotary_dim or 0) // 2
        short, long = (
            None if factors is None else len(factors)
            for factors in (self.longrope_short_factor, self.longrope_long_factor)
        )
        if (short, long) != (n, n):
            raise ConfigError(
                f"longrope_short_factor has {short} entries and longrope_long_factor {long}: give "
                f"both, one number for each of the {n} rotary frequencies (rotary_dim / 2)."
            )
        if self.use_NTK_by_parts_rope or self.use_yarn_rope or self.rotary_scaling_factor != 1.0:
            raise ConfigError(
                "longrope_short_factor was given beside another scaling of rotary frequencies "
                "(use_NTK_by_parts_rope, use_yarn_rope or rotary_scaling_factor). Give one of them."
            )

    def _check_one_of(self, field: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            near = did_you_mean(str(value), [str(option) for option in allowed])
            raise ConfigError(f"{field}={value!r} must be one of {allowed}.{near}")

    @classmethod
    def unwrap(
        cls, config: Union[dict[str, Any], "HookedTransformerConfig"]
    ) -> "HookedTransformerConfig":
        """A config from a dict of fields; a config is returned as it is, not copied."""
        return cls.from_dict(config) if isinstance(config, dict) else config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "HookedTransformerConfig":
        """Build from a dict of field names; an unknown name is an error with near names."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in config_dict:
            if name not in names:
                raise ConfigError(f"no config field {name!r}.{did_you_mean(name, names)}")
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The live ``__dict__``, as TransformerLens returns it: editing it edits the config."""
        return self.__dict__

    def is_layer_norm_activation(self) -> bool:
        """Whether the activation ends in a LayerNorm of its own (``solu_ln``)."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed torch, Python's ``random`` and numpy."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of TransformerLens, or of an earlier version, lacks the newer fields.
        fields = dataclasses.fields(self)
        older = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        self.__dict__.update({**older, **state})
        if not older.keys() <= state.keys():
            self._name_mechanisms()

    def __repr__(self) -> str:
        return "HookedTransformerConfig:\n" + pprint.pformat(self.to_dict())
