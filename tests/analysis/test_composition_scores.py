"""Composition scores against the definition, the model's own and TransformerLens'."""

import pytest
import torch

from fastlens.analysis.composition_scores import composition_scores
from fastlens.errors import FastlensError
from tests.close import assert_close_to
from tests.models import ours, theirs

NAMES = ["gpt2", "llama", "llama_mqa", "attn_only"]


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("name", NAMES)
def test_by_definition(name, mode):
    model = ours(name, dtype=torch.float64)
    scores = composition_scores(model, mode)
    assert scores.axes == ("sender_layer", "sender_head", "layer", "head")
    assert_close_to(scores.values, model.all_composition_scores(mode), atol=1e-12)
    group = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    for a in range(model.cfg.n_layers):
        for b in range(model.cfg.n_layers):
            for i in range(4):
                for j in range(4):
                    attn = model.blocks[b].attn
                    w_k, w_v, _, _ = attn.key_value_leaves()
                    qk = attn.W_Q[j] @ w_k[j // group].T
                    right = {"Q": qk, "K": qk.T, "V": w_v[j // group] @ attn.W_O[j]}[mode]
                    left = model.W_V[a, i] @ model.W_O[a, i]
                    want = (left @ right).norm() / left.norm() / right.norm() * (a < b)
                    found = scores.values[a, i, b, j].item()
                    assert found == pytest.approx(want.item(), abs=1e-12)


@pytest.mark.tl
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_are_those_of_transformer_lens(name, mode):
    pytest.importorskip("transformer_lens")
    a, b = theirs(name), ours(name)
    b.load_state_dict(a.state_dict())
    assert_close_to(composition_scores(b, mode).values, a.all_composition_scores(mode), atol=1e-5)


def test_one_head_that_reads_another():
    """The receiver's queries read exactly the directions that the sender writes."""
    model = ours("attn_only", d_model=32, d_head=8)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "W_Q" in name or "W_O" in name or "W_V" in name:
                leaf.zero_()
        model.blocks[0].attn.W_V[1] = torch.eye(32)[:, :8]
        model.blocks[0].attn.W_O[1] = torch.eye(32)[8:16]
        model.blocks[1].attn.W_Q[2] = torch.eye(32)[:, 8:16]
        model.blocks[1].attn.W_K[2] = torch.eye(32)[:, 16:24]
    scores = composition_scores(model, "Q")
    cell = scores.top(1)[0]
    assert cell.labels == ("L0", "H1", "L1", "H2")
    assert cell.value == pytest.approx(1 / 8**0.5)
    assert composition_scores(model, "K").values.nan_to_num()[0, 1, 1, 2] == 0
    picture = scores.select(sender_layer="L0", sender_head="H1")
    assert picture.axes == ("layer", "head") and picture.values[1, 2] == cell.value
    assert scores.meta["random"] == pytest.approx(32**-0.5)
    assert not scores.values.requires_grad


def test_modes_that_are_none():
    with pytest.raises(FastlensError, match="'Q', 'K' or 'V'"):
        composition_scores(ours("gpt2"), "q")
