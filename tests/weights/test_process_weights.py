"""`ProcessWeights` against TransformerLens' own, and what it does better.

Every method on float32 weights is compared in tests/compat/calls/loading.py.
"""

import warnings

import pytest
import torch

from fastlens.errors import ConfigError, WeightsError
from fastlens.weights.process_weights import ProcessWeights
from tests.close import assert_close_to
from tests.models import ours, prompts

STEPS = ("fold_layer_norm", "center_writing_weights", "center_unembed", "fold_value_biases")


def state_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
        if not key.endswith("IGNORE")
    }


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "attn_only", "solu_ln"])
def test_float64_stays_float64(name):
    """TransformerLens' single steps keep float64; its `process_weights` rounds to float32."""
    tl = pytest.importorskip("transformer_lens.weight_processing").ProcessWeights
    model = ours(name)
    cfg = model.cfg
    rms = cfg.normalization_type == "RMS"
    want = state_of(model, torch.float64)
    for step in STEPS:
        if rms and step == "center_writing_weights":
            continue
        options = {"fold_biases": not rms, "center_weights": not rms}
        arguments = options if step == "fold_layer_norm" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = getattr(tl, step)(want, cfg, **arguments)
    got = ProcessWeights.process_weights(state_of(model, torch.float64), cfg)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        if key.endswith("b_O") and not rms:
            # Centred once more, as `process_weights` does.
            tensor = tensor - tensor.mean()
        if tensor.is_floating_point() and "rotary" not in key:
            assert_close_to(got[key], tensor, atol=1e-12, name=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_processed_in_float32(dtype):
    model = ours("gpt2")
    rounded = state_of(model, dtype)
    got = ProcessWeights.process_weights(dict(rounded), model.cfg)
    exact = {k: v.float() if v.is_floating_point() else v for k, v in rounded.items()}
    want = ProcessWeights.process_weights(exact, model.cfg)
    for key in want:
        assert got[key].dtype == rounded.get(key, want[key].to(dtype)).dtype, key
        assert torch.equal(got[key], want[key].to(got[key].dtype)), key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_model_computes_the_same(name):
    model, processed = ours(name), ours(name)
    processed.load_state_dict(
        ProcessWeights.process_weights(state_of(model), model.cfg), strict=False
    )
    want, got = (m(prompts()).log_softmax(-1) for m in (model, processed))
    assert_close_to(got, want, atol=2e-5)


def test_what_is_changed_and_what_is_not():
    """As in TransformerLens, only `center_writing_weights` writes into the dict it is given."""
    model = ours("gpt2")
    for step in (*STEPS, "refactor_factored_attn_matrices", "process_weights"):
        state = state_of(model)
        before = dict(state)
        result = getattr(ProcessWeights, step)(state, model.cfg)
        same = all(state[key] is before[key] for key in before)
        assert same == (step != "center_writing_weights"), step
        assert (result is state) == (step == "center_writing_weights"), step
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), step


def test_steps_that_would_change_the_model_are_left_out(caplog):
    model = ours("gpt2")
    model.cfg.output_logits_soft_cap = 30.0
    state = ProcessWeights.process_weights(state_of(model), model.cfg, fold_ln=False)
    assert torch.equal(state["unembed.W_U"], model.W_U)
    assert "center_unembed=True is not possible" in caplog.text
    model.cfg.norm_after_sublayer = model.cfg.use_attention_sinks = True
    for step in ("center_writing_weights", "fold_layer_norm", "fold_value_biases"):
        state = getattr(ProcessWeights, step)(state_of(model), model.cfg)
        assert all(torch.equal(state[key], value) for key, value in state_of(model).items()), step


def test_errors_say_what_to_do():
    model = ours("gpt2")
    with pytest.raises(ConfigError, match=r"adapter=object .*TransformerBridge"):
        ProcessWeights.fold_layer_norm(state_of(model), model.cfg, adapter=object())
    with pytest.raises(WeightsError, match=r"no unembed\.W_U"):
        ProcessWeights.center_unembed({"W": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"no embed\.W_E"):
        ProcessWeights.center_writing_weights({}, model.cfg)
    with pytest.raises(ConfigError, match="rotary"):
        ProcessWeights.refactor_factored_attn_matrices({}, ours("llama").cfg)
