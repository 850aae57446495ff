"""TransformerLens' direct logit attribution: its values, and its errors."""

import warnings

import pytest
import torch

from fastlens.compat.tools_analysis.direct_logit_attribution import (
    DirectLogitAttribution,
    direct_logit_attribution,
)
from tests.close import assert_close_to
from tests.models import ours, prompts, theirs
from tests.patching.texts import text_model

_PATH = "transformer_lens.tools.analysis.direct_logit_attribution."
# What tests here compare with TransformerLens 3.9, on equal weights.
COMPARED = [
    _PATH + "DirectLogitAttribution",
    _PATH + "DirectLogitAttribution.top",
    _PATH + "direct_logit_attribution",
]


@pytest.mark.tl
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_are_those_of_transformer_lens(name, unit):
    # The package has a function of the module's name.
    tl = pytest.importorskip("transformer_lens.tools.analysis.direct_logit_attribution")
    a, b = theirs(name), ours(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a.process_weights_()
    b.process_weights_()
    tokens = prompts(2, 7)
    for options in (
        {"answer_tokens": 3},
        {"answer_tokens": 3, "incorrect_tokens": 7, "pos": 2},
        {"answer_tokens": torch.tensor([3, 4]), "incorrect_tokens": torch.tensor([7, 8])},
        {"answer_tokens": 3, "pos": None},
    ):
        want = tl.direct_logit_attribution(a, tokens, **options, unit=unit)
        got = direct_logit_attribution(b, tokens, **options, unit=unit)
        assert (got.labels, got.unit) == (want.labels, want.unit)
        assert_close_to(got.attribution, want.attribution, atol=1e-5)
        for k in (3, 100):
            mine, its = got.top(k), want.top(k)
            assert [label for label, _ in mine] == [label for label, _ in its]
            assert_close_to([v for _, v in mine], [v for _, v in its], atol=1e-5)
    _, cache = b.run_with_cache(tokens[:1], remove_batch_dim=True)
    alone = direct_logit_attribution(b, answer_tokens=3, unit=unit, cache=cache)
    assert alone.attribution.ndim == 1
    first = direct_logit_attribution(b, tokens[:1], 3, unit=unit)
    assert_close_to(alone.attribution, first.attribution[:, 0], atol=1e-6)


def test_text_and_parallel_blocks():
    found = direct_logit_attribution(text_model(), "the cat in a", " cat", " the")
    assert found.attribution.shape == (len(found.labels), 1)
    # There is no stream between attention and MLP.
    layers = direct_logit_attribution(ours("neox"), prompts(1, 5), 3, unit="layer")
    assert layers.labels == ["0_pre", "1_pre", "final_post"]


def test_top_of_one_value_a_component():
    found = DirectLogitAttribution(torch.tensor([1.0, 3.0, 2.0]), ["a", "b", "c"], "head")
    assert found.top(2) == [("b", 3.0), ("c", 2.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": "x", "answer_tokens": 3, "unit": "heads"}, "Nearest: 'head'"),
        ({"input": "x"}, "answer_tokens is required"),
        ({"answer_tokens": 3}, "input= to run the model on, or the cache="),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        direct_logit_attribution(ours("gpt2"), **arguments)
