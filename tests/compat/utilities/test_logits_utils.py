"""Tables of logits, against TransformerLens."""

import sys

import pytest
import torch

from fastlens.compat.utilities.logits_utils import logits_to_df, sample_logits
from fastlens.errors import MissingDependencyError, ShapeError
from fastlens.sampling import SamplingError
from tests.fixtures_tokens import gpt2_like

COMPARED = [
    "transformer_lens.utilities.logits_utils.logits_to_df",
    "transformer_lens.utilities.logits_utils.sample_logits",
]

LOGITS = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0))


@pytest.mark.tl
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 0}, {"top_k": 100}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_as_transformer_lens(theirs, options, dtype, with_tokenizer):
    tokenizer = gpt2_like() if with_tokenizer else None
    logits = LOGITS.to(dtype).requires_grad_()
    # In bfloat16 some logits are equal; which comes first is torch's to say, to both alike.
    found = logits_to_df(logits, tokenizer, **options)
    wanted = theirs("logits_utils").logits_to_df(logits, tokenizer=tokenizer, **options)
    assert found.equals(wanted) and list(found.columns) == list(wanted.columns)
    assert (found.dtypes == wanted.dtypes).all()


def test_float64_stays_float64():
    """TransformerLens computes the probabilities in float32."""
    table = logits_to_df(LOGITS.double())
    exact = LOGITS.double().softmax(-1).sort(descending=True).values
    assert (torch.tensor(table.probability) - exact).abs().max() < 1e-15


def test_what_it_refuses(monkeypatch):
    with pytest.raises(ShapeError, match="have 2 axes.*Give logits"):
        logits_to_df(LOGITS[None])
    with pytest.raises(SamplingError, match="top_k=-1"):
        logits_to_df(LOGITS, top_k=-1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        logits_to_df(LOGITS)


@pytest.mark.tl
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"top_k": 5, "temperature": 0.7},
        {"top_p": 0.8, "freq_penalty": 0.5, "repetition_penalty": 1.2},
    ],
    ids=repr,
)
def test_drawing_as_transformer_lens(theirs, options):
    logits, tokens = LOGITS.view(4, 10), torch.randint(10, (4, 6))
    for seed in range(10):
        torch.manual_seed(seed)
        wanted = theirs("logits_utils").sample_logits(logits.clone(), tokens=tokens, **options)
        torch.manual_seed(seed)
        assert torch.equal(sample_logits(logits, tokens=tokens, **options), wanted)
