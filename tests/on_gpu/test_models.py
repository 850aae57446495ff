"""Whole models: the device gives what the CPU gives, with Triton's kernels and without."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fastlens.cli import app
from fastlens.ops import dispatch
from fastlens.patching import logit_diff, sweep
from fastlens.settings import TRITON
from tests.close import assert_close_to
from tests.models import ours, prompts

FAMILIES = ("gpt2", "llama", "neox", "local", "alibi", "softcap", "bidirectional", "qk_norm")
each_family = pytest.mark.parametrize("family", FAMILIES)
# DESIGN section 8: logits of tiny random models, and values of a sweep.
LOGITS, VALUES = 1e-5, 1e-4


@pytest.fixture(params=["1", ""], ids=["triton", "no triton"], autouse=True)
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With FASTLENS_TRITON=1 and unset."""
    monkeypatch.delenv(TRITON.name, raising=False)
    if request.param:
        monkeypatch.setenv(TRITON.name, request.param)
    return bool(request.param)


def on(device, model):
    """The same weights there."""
    return model.to(device, print_details=False)


@each_family
@pytest.mark.parametrize("pos", [1, 37])
def test_a_forward(device, family, pos):
    tokens = prompts(3, pos)
    expected = ours(family)(tokens).detach()
    model = on(device, ours(family))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(tokens.to(device))
        assert found.device.type == device.type
        assert_close_to(found, expected, atol=LOGITS * (1 + float(expected.abs().max())))


@each_family
def test_gradients_of_every_weight(device, family):
    tokens = prompts(2, 9)

    def gradients(model, tokens):
        model(tokens, return_type="loss").backward()
        return {name: leaf.grad for name, leaf in model.named_parameters() if leaf.grad is not None}

    expected = gradients(ours(family), tokens)
    found = gradients(on(device, ours(family)), tokens.to(device))
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        bound = 1e-4 * (1 + float(want.abs().max()))
        assert_close_to(found[name], want, atol=bound, name=name)


@each_family
@pytest.mark.parametrize("wanted", [None, "resid", "pattern"])
def test_run_with_cache(device, family, wanted):
    tokens = prompts(2, 12)
    names = None if wanted is None else (lambda name: wanted in name)
    _, expected = ours(family).run_with_cache(tokens, names_filter=names)
    _, found = on(device, ours(family)).run_with_cache(tokens.to(device), names_filter=names)
    assert found.keys() == expected.keys()
    for name in expected:
        want = expected[name]
        assert found[name].device.type == device.type
        finite = want[want.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        assert_close_to(found[name], want, atol=LOGITS * (1 + largest), name=name)


@each_family
@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_out"])
def test_a_sweep(device, family, site):
    clean, corrupted = prompts(1, 8), prompts(1, 8)
    corrupted[:, 5:] = (corrupted[:, 5:] + 7) % 50
    axes = ("layer", "pos", "head") if site == "z" else ("layer", "pos")
    metric = logit_diff(3, 4)

    def swept(model, *tokens):
        return sweep(model, *tokens, sites=site, by=axes, metric=metric, progress=False).values

    expected = swept(ours(family), clean, corrupted)
    found = swept(on(device, ours(family)), clean.to(device), corrupted.to(device))
    assert_close_to(found, expected, atol=VALUES * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_forward_waits_for_nothing(device, family, waiting_is_an_error):
    model, tokens = on(device, ours(family)), prompts(2, 12).to(device)
    expected = model(tokens)
    with waiting_is_an_error():
        found = model(tokens)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_stream_of_ones_own(device, family):
    """Launches go to the stream that is current, not to the default one."""
    model, tokens = on(device, ours(family)), prompts(2, 12).to(device)
    expected = model(tokens)
    if device.type != "cuda":
        assert torch.equal(model(tokens), expected)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = model(tokens)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_doctor_names_what_was_chosen(device, triton):
    """And Triton's kernels are among it if they are switched on and the device is a GPU's."""
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(result.stdout)["kernels"] if row["device"] == device.type]
    assert {row["op"] for row in rows} == set(dispatch.kernels())
    chosen = {row["kernel"] for row in rows if row["dtype"] == "bfloat16"}
    takes_triton = any(name.startswith("triton") for name in chosen)
    assert takes_triton == (triton and device.type == "cuda")
