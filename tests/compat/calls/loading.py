"""Loading and processing: `loading_from_pretrained`, the conversions, `ProcessWeights`."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.compat.library import Library
from tests.weights.checkpoints import VOCAB, hf_model, save_folder

# Of the fields TransformerLens gives, those that say what a model computes.
# (It caps some models' n_ctx at 2048.)
FIELDS = """d_model d_head n_heads d_mlp n_layers eps d_vocab act_fn use_attn_scale
use_local_attn scale_attn_by_inverse_layer_idx normalization_type original_architecture
positional_embedding_type rotary_base rotary_dim gated_mlp n_key_value_heads
parallel_attn_mlp rotary_adjacent_pairs""".split()
CASES = {"gpt2": "gpt2", "neox": "neox", "mistral": "mistral_window"}


@functools.cache
def _folder(case: str) -> Path:
    """A checkpoint folder, kept until the tests end. Its name must not say "llama", by which
    TransformerLens would know it."""
    kept = _KEPT.setdefault(case, tempfile.TemporaryDirectory(prefix="checkpoint"))
    # Published configs state n_ctx, which TransformerLens reads.
    return save_folder(Path(kept.name), case, **({"n_ctx": 32} if case == "gpt2" else {}))


_KEPT: dict[str, Any] = {}


def _fields(lens: Library, found: Any) -> dict[str, Any]:
    """What the config says that is made of it: fields that are left out have defaults."""
    if isinstance(found, dict):
        found = lens("config.HookedTransformerConfig").from_dict({**found, "device": "cpu"})
    return {name: getattr(found, name) for name in FIELDS}


def _configs(name: str, **options: Any):
    def call(lens: Library):
        function = lens(f"loading_from_pretrained.{name}")
        return {
            case: _fields(lens, function(str(_folder(of)), **options)) for case, of in CASES.items()
        }

    return call


def _cfg(lens: Library, case: str) -> Any:
    """A config made by hand, the same for both libraries, for a tiny transformers model."""
    config = hf_model(case).config
    grouped = case.startswith(("llama", "mistral"))
    return lens("config.HookedTransformerConfig")(
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=3,
        n_ctx=32,
        d_vocab=VOCAB,
        d_mlp=getattr(config, "intermediate_size", 128),
        act_fn="gelu",
        n_key_value_heads=2 if grouped else None,
        device="cpu",
    )


def _conversion(name: str, case: str):
    def call(lens: Library):
        convert = lens(f"pretrained.weight_conversions.convert_{name}_weights")
        return _without_extra_biases(convert(hf_model(case), _cfg(lens, case)))

    return call


def _without_extra_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TransformerLens leaves some zero biases out, which is what a model starts with."""
    is_bias = lambda key: key.rsplit(".", 1)[-1].startswith(("b_", "_b_"))  # noqa: E731
    return {k: v for k, v in tensors.items() if not (is_bias(k) and not v.any())}


def _encoder(name: str):
    """BERT and T5, whose tiny models are made here."""

    def call(lens: Library):
        import transformers

        torch.manual_seed(0)
        if name == "bert":
            config = transformers.BertConfig(
                vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=32,
            )  # fmt: skip
            model = transformers.BertForPreTraining(config)
        else:
            config = transformers.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                decoder_start_token_id=0,
            )  # fmt: skip
            model = transformers.T5ForConditionalGeneration(config)
        cfg = lens("config.HookedTransformerConfig")(
            d_model=32, d_head=8, n_heads=4, n_layers=2, n_ctx=32, d_vocab=VOCAB, d_mlp=64,
            act_fn="gelu", device="cpu", attention_dir="bidirectional",
        )  # fmt: skip
        return lens(f"pretrained.weight_conversions.convert_{name}_weights")(model.eval(), cfg)

    return call


def _state_dict(lens: Library):
    function = lens("loading_from_pretrained.get_pretrained_state_dict")
    cfg = _cfg(lens, "gpt2")
    cfg.original_architecture, cfg.model_name = "GPT2LMHeadModel", "gpt2"
    return _without_extra_biases(function("gpt2", cfg, hf_model("gpt2")))


def _filled(lens: Library):
    state = lens.gpt2.state_dict()
    del state["blocks.1.mlp.b_in"], state["ln_final.w"]
    return lens("loading_from_pretrained.fill_missing_keys")(lens.gpt2, state)


NAMES = ["gpt2", "GPT2-small", "pythia-70m", "EleutherAI/pythia-19m", "stanford-gpt2-small-a"]


def _basic(lens: Library):
    return vars(lens("loading_from_pretrained.get_basic_config")(str(_folder("gpt2"))))


def _alias_map(lens: Library):
    found = lens("loading_from_pretrained.make_model_alias_map")()
    return {name.lower(): found[name.lower()] for name in NAMES}


# -- processing ------------------------------------------------------------------------------------


def _step(name: str, model: str = "gpt2", **options: Any):
    """One step on a tiny model's state dict."""

    def call(lens: Library):
        instance = lens.fresh(model)
        state = {k: v for k, v in instance.state_dict().items() if not k.endswith("IGNORE")}
        return getattr(lens("weight_processing.ProcessWeights"), name)(
            state, instance.cfg, **options
        )

    return call


def _steps(name: str, **options: Any):
    """The step for each of the tiny families."""
    rms = {"fold_biases": False, "center_weights": False} if name == "fold_layer_norm" else {}
    kinds = {"gpt2": {}, "neox": {}, "attn_only": {}, "llama": rms}
    calls = {kind: _step(name, kind, **options, **more) for kind, more in kinds.items()}
    return lambda lens: {kind: call(lens) for kind, call in calls.items()}


def _unchanged_product(lens: Library):
    """The factors are unique up to signs, so their products are compared."""
    state = _step("refactor_factored_attn_matrices")(lens)
    return [
        (
            state[f"blocks.{layer}.attn.W_Q"] @ state[f"blocks.{layer}.attn.W_K"].mT,
            state[f"blocks.{layer}.attn.W_V"] @ state[f"blocks.{layer}.attn.W_O"],
            state[f"blocks.{layer}.attn.W_Q"].norm(dim=1),
            state[f"blocks.{layer}.attn.b_O"],
        )
        for layer in range(lens.gpt2.cfg.n_layers)
    ]


def _one(name: str, *shapes: tuple[int, ...]):
    def call(lens: Library):
        tensors = [lens.random(*shape, seed=n) for n, shape in enumerate(shapes)]
        return getattr(lens("weight_processing.ProcessWeights"), name)(*tensors)

    return call


def _extracted(lens: Library):
    model = lens.llama
    return lens("weight_processing.ProcessWeights").extract_attention_tensors_for_folding(
        model.state_dict(), model.cfg, 1, None
    )


W, KV, B, D = (4, 6, 3), (2, 6, 3), (4, 3), (6,)
CALLS = {
    "loading_from_pretrained": {
        "make_model_alias_map": _alias_map,
        "get_official_model_name": lambda lens: [
            lens("loading_from_pretrained.get_official_model_name")(name) for name in NAMES
        ],
        "convert_hf_model_config": _configs("convert_hf_model_config"),
        "get_pretrained_model_config": _configs(
            "get_pretrained_model_config", fold_ln=True, first_n_layers=2, n_ctx=16, device="cpu"
        ),
        "get_num_params_of_pretrained": lambda lens: lens(
            "loading_from_pretrained.get_num_params_of_pretrained"
        )(str(_folder("gpt2"))),
        "get_checkpoint_labels": lambda lens: [
            lens("loading_from_pretrained.get_checkpoint_labels")(name)
            for name in ("pythia-70m", "pythia-70m-v0", "stanford-gpt2-small-a")
        ],
        "get_pretrained_state_dict": _state_dict,
        "fill_missing_keys": _filled,
        "Config": lambda lens: vars(lens("loading_from_pretrained.Config")()),
        "get_basic_config": _basic,
    },
    "pretrained.weight_conversions": {
        "gpt2.convert_gpt2_weights": _conversion("gpt2", "gpt2"),
        "neox.convert_neox_weights": _conversion("neox", "neox"),
        "llama.convert_llama_weights": _conversion("llama", "llama_grouped"),
        "mistral.convert_mistral_weights": _conversion("mistral", "mistral_plain"),
        "bert.convert_bert_weights": _encoder("bert"),
        "t5.convert_t5_weights": _encoder("t5"),
    },
    "weight_processing": {"ProcessWeights": _step("center_unembed")},
    "weight_processing.ProcessWeights": {
        "fold_layer_norm": _steps("fold_layer_norm"),
        "center_writing_weights": _steps("center_writing_weights"),
        "center_unembed": _steps("center_unembed"),
        "fold_value_biases": _steps("fold_value_biases"),
        "process_weights": _steps("process_weights"),
        "refactor_factored_attn_matrices": _unchanged_product,
        "fold_layer_norm_bias_single": _one("fold_layer_norm_bias_single", W, B, D),
        "fold_layer_norm_weight_single": _one("fold_layer_norm_weight_single", W, D),
        "center_weight_single": _one("center_weight_single", W),
        "fold_layer_norm_biases": _one("fold_layer_norm_biases", W, KV, KV, B, (2, 3), (2, 3), D),
        "fold_layer_norm_weights": _one("fold_layer_norm_weights", W, KV, KV, D),
        "center_attention_weights": _one("center_attention_weights", W, KV, KV),
        "extract_attention_tensors_for_folding": _extracted,
        "convert_tensor_to_tl_format": lambda lens: lens(
            "weight_processing.ProcessWeights"
        ).convert_tensor_to_tl_format("blocks.0.attn.W_Q", {}, lens.random(2, 3), lens.gpt2.cfg),
        "convert_tensor_to_hf_format": lambda lens: lens(
            "weight_processing.ProcessWeights"
        ).convert_tensor_to_hf_format("blocks.0.attn.W_Q", lens.random(2, 3), lens.gpt2.cfg),
    },
}
