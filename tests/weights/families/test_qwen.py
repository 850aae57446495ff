"""Qwen 1: its code is not in transformers, so TransformerLens 3.9 in float64 is the truth."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlens import HookedTransformer
from fastlens.errors import ConfigError, ShapeError, WeightsError
from fastlens.weights.families.qwen import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.facts import check_aliases
from tests.weights.families.generated import tokens_of

CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 60,
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "kv_channels": 8, "seq_length": 24, "max_position_embeddings": 96, "rotary_pct": 1.0,
    "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "no_bias": True,
    "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True,
    "use_flash_attn": "auto", "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "bf16": True,
    "fp16": False, "fp32": False, "onnx_safe": None, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
}  # fmt: skip
SHAPES = {
    "transformer.wte.weight": (60, 32),
    "transformer.ln_f.weight": (32,),
    "lm_head.weight": (60, 32),
    **{
        f"transformer.h.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "ln_1.weight": (32,), "ln_2.weight": (32,), "attn.c_attn.weight": (96, 32),
            "attn.c_attn.bias": (96,), "attn.c_proj.weight": (32, 32), "mlp.w1.weight": (48, 32),
            "mlp.w2.weight": (48, 32), "mlp.c_proj.weight": (32, 48),
        }.items()
    },
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "ln_" in name else 0.0)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


def as_modules(tensors: dict[str, Tensor]) -> SimpleNamespace:
    """What the remote code would build, as far as TransformerLens' converter looks."""
    root = SimpleNamespace()
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                setattr(at, part, SimpleNamespace())
            at = getattr(at, part)
        setattr(at, leaf, tensor.double())
    h = root.transformer.h
    root.transformer.h = [getattr(h, str(layer)) for layer in range(2)]
    return root


def by_transformer_lens():
    """TransformerLens' own config and converter, offline."""
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens import loading_from_pretrained as loading
    from transformer_lens.pretrained.weight_conversions import convert_qwen_weights

    theirs = SimpleNamespace(**CONFIG, initializer_range=0.02)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(
            loading, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: theirs)
        )
        fields = loading.convert_hf_model_config("Qwen/Qwen-7B")
        del fields["tokenizer_name"]
        fields |= {"device": "cpu", "dtype": torch.float64, "init_weights": False}
        cfg = lens.HookedTransformerConfig.from_dict(fields)
        model = lens.HookedTransformer(cfg)
        state = convert_qwen_weights(as_modules(weights()), cfg)
        model.load_state_dict(state, strict=False)
    return model.eval(), fields


@pytest.mark.tl
def test_logits_and_config_are_transformer_lens(folder):
    model, fields = by_transformer_lens()
    ours = HookedTransformer.from_pretrained_no_processing(
        folder, verbose=False, dtype=torch.float64
    )
    with torch.no_grad():
        want = model(tokens_of())
        # TransformerLens computes its rotary tables in float32.
        assert_close_to(ours(tokens_of()), want, atol=1e-6, name="logits")
        folded = HookedTransformer.from_pretrained(folder, verbose=False)(tokens_of())
        assert_close_to(folded.log_softmax(-1), want.log_softmax(-1), atol=2e-5, name="log p")
    for name, value in fields.items():
        if name in (
            "dtype",
            "init_weights",
            "initializer_range",
            "tokenizer_prepends_bos",
            "trust_remote_code",
        ):
            continue
        assert getattr(ours.cfg, name) == value, name


def test_beyond_the_training_length(folder):
    """Up to it log-n attention and dynamic NTK are the identity; beyond it nothing is computed."""
    model = HookedTransformer.from_pretrained(folder, verbose=False)
    tokens = tokens_of(1, 25)
    with torch.no_grad():
        assert model(tokens[:, :24]).isfinite().all()
        with pytest.raises(ShapeError, match="25 tokens was given to a model trained on 24"):
            model(tokens)
        with pytest.raises(ShapeError, match="dynamic NTK"):
            model.generate(tokens[:, :23], max_new_tokens=5, stop_at_eos=False, verbose=False)
        longer = HookedTransformer.from_pretrained(folder, n_ctx=64, verbose=False)
        with pytest.raises(ShapeError, match="at most 24 tokens"):
            longer(tokens)
        # Without the two, longer texts are ordinary ones.
        longer.cfg.use_logn_attn = longer.cfg.use_dynamic_ntk_rope = False
        assert longer(tokens).isfinite().all()


@pytest.mark.parametrize("stated", [{"no_bias": False}, {"kv_channels": 4}, {"surprise": 1}])
def test_what_is_not_accounted_for(stated):
    with pytest.raises(ConfigError, match=next(iter(stated))):
        FAMILY.config_fields({**CONFIG, **stated})


def test_tensors_that_are_missing(folder):
    tensors = weights()
    del tensors["transformer.h.1.attn.c_attn.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: transformer\.h\.1\.attn\.c_attn\.bias"):
        open_source(folder)


@pytest.mark.tl
def test_names():
    assert check_aliases(FAMILY, "qwen-1.8b-chat", "qwen-14b") == 12
