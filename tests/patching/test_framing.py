"""From model and prompts to integers: masks, positions, first differences, sizes."""

import pytest
import torch

from fastlens.patching.framing import frame_of, stem_of
from tests.close import assert_close_to
from tests.models import ours, prompts


def pair(batch=3, pos=6, at=(2, 4, None)):
    """Tokens, and others that differ from one position of each example on, if at all."""
    base = prompts(batch, pos)
    other = base.clone()
    for example, position in enumerate(at):
        if position is not None:
            other[example, position] = (other[example, position] + 1) % 50
    return base, other


# -- the stem ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "alibi", "post_embedding_ln"])
def test_the_stem_is_what_enters_the_first_block(name):
    model = ours(name)
    base, other = pair()
    stem, first = stem_of(model, base, other, None)
    expected = [
        model.run_with_cache(tokens, names_filter=["blocks.0.hook_resid_pre"])[1][
            "blocks.0.hook_resid_pre"
        ]
        for tokens in (base, other)
    ]
    assert_close_to(stem.residual, torch.cat(expected), atol=0)
    assert first == [2, 4, 6]
    assert stem.key_mask is None and stem.shortformer is None
    assert stem.rotary_pos.tolist() == [list(range(6))] * 6


def test_positions_that_only_queries_and_keys_see():
    model = ours("shortformer")
    base, other = pair()
    stem, _ = stem_of(model, base, other, None)
    assert stem.shortformer.shape == (6, 6, 32)
    assert_close_to(stem.shortformer[4], model.pos_embed.W_pos[:6], atol=0)


def test_without_another_prompt():
    base, _ = pair()
    stem, first = stem_of(ours("gpt2"), base, None, None)
    assert stem.residual.shape == (3, 6, 32)
    assert first == [6, 6, 6]


def test_each_pair_has_its_own_first_difference():
    base, other = pair(at=(0, 5, 3))
    other[2, 5] = (other[2, 5] + 1) % 50
    assert stem_of(ours("gpt2"), base, other, None)[1] == [0, 5, 3]
    assert stem_of(ours("gpt2"), base, base, None)[1] == [6, 6, 6]


def test_a_mask_shifts_positions_and_hides_keys():
    base, other = pair()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0]])
    stem, first = stem_of(ours("llama"), base, other, mask)
    assert stem.key_mask.tolist() == torch.cat([mask, mask]).bool().tolist()
    assert stem.rotary_pos[0].tolist()[2:] == [0, 1, 2, 3]
    assert stem.rotary_pos[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(stem.rotary_pos[:3], stem.rotary_pos[3:])
    # One mask for both: the pairs differ where their tokens do.
    assert first == [2, 4, 6]


def test_where_only_the_masks_differ():
    """A model that masks its padding by itself may see other padding in the other prompt."""
    model = ours("gpt2")
    base = prompts(1, 6)
    masks = iter([torch.tensor([[1] * 6]), torch.tensor([[0, 1, 1, 1, 1, 1]])])

    def input_to_embed(tokens, **kwargs):
        return type(model).input_to_embed(model, tokens, attention_mask=next(masks))

    model.input_to_embed = input_to_embed
    stem, first = stem_of(model, base, base.clone(), None)
    assert first == [0]
    assert stem.key_mask.tolist() == [[True] * 6, [False] + [True] * 5]


def test_where_only_one_prompt_is_masked():
    model = ours("gpt2")
    base = prompts(1, 6)
    masks = iter([None, torch.tensor([[1, 1, 1, 0, 1, 1]])])

    def input_to_embed(tokens, **kwargs):
        mask = next(masks)
        given = {} if mask is None else {"attention_mask": mask}
        return type(model).input_to_embed(model, tokens, **given)

    model.input_to_embed = input_to_embed
    stem, first = stem_of(model, base, base.clone(), None)
    assert first == [3]
    assert stem.key_mask[0].all() and not stem.key_mask[1, 3]
    assert stem.rotary_pos[0].tolist() == [0, 1, 2, 3, 4, 5]


# -- the frame -----------------------------------------------------------------------------------


def frame(
    name="gpt2", first=(2, 6), needed=(5,), n_pos=6, has_source=True, keeps_later=False, **changes
):
    return frame_of(
        ours(name, **changes),
        first,
        needed,
        2,
        n_pos,
        has_source=has_source,
        keeps_later=keeps_later,
    )


def test_sizes_are_those_of_the_config():
    found = frame("llama")
    sizes = found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.d_head
    assert sizes == (3, 32, 4, 2, 8)
    assert (found.d_mlp, found.is_gated, found.columns, found.itemsize) == (48, True, 2, 4)
    assert (found.batch, found.n_pos, found.needed) == (2, 6, (5,))
    assert found.is_causal and not found.is_parallel and not found.is_attn_only
    assert frame("gpt2").n_kv_heads == 4 and not frame("gpt2").is_gated
    assert frame("neox").is_parallel
    assert frame("attn_only").is_attn_only and frame("attn_only").d_mlp == 0
    assert not frame("gpt2", has_source=False).has_source


def test_flags_and_dtypes_that_change_sizes():
    model = ours("llama").double()
    model.cfg.ungroup_grouped_query_attention = True
    found = frame_of(model, [2], [5], 2, 6, has_source=True, keeps_later=False)
    assert (found.n_kv_heads, found.itemsize) == (4, 8)


def test_positions_behind_the_last_one_read_are_left_out():
    found = frame(first=(2, 6), needed=(1, 3))
    assert found.n_pos == 4
    # A pair that differs only behind it does not differ.
    assert found.first_difference == (2, 4)
    assert frame(first=(5,), needed=(3,)).first_difference == (4,)


def test_unless_something_may_look_ahead():
    found = frame(needed=(1, 3), keeps_later=True)
    assert (found.n_pos, found.first_difference) == (6, (2, 6))


def test_where_every_row_sees_every_other():
    found = frame("bidirectional", first=(2, 6, 5), needed=(1,))
    assert (found.n_pos, found.is_causal) == (6, False)
    assert found.first_difference == (0, 6, 0)


def test_what_the_planner_is_told_of_sources():
    def null(patch, example):
        return frozenset()

    model = ours("gpt2")
    options = {"has_source": False, "keeps_later": False}
    found = frame_of(model, [6], [5], 2, 6, nulls={1: null}, caches=[1, 2], **options)
    assert found.nulls == {1: null} and found.caches == {1, 2}
    assert frame().nulls == {} and frame().caches == frozenset()


def test_mixtures_of_experts():
    options = {"has_source": True, "keeps_later": False}
    model = ours("moe", d_shared_expert=28)
    found = frame_of(model, [2], [5], 2, 6, **options)
    assert (found.experts_width, found.n_experts, found.d_shared) == (2 * 20 + 28, 5, 28)
    assert found.is_gated and found.d_mlp == 20
    assert frame_of(ours("llama"), [2], [5], 2, 6, **options).experts_width == 0
    dense_first = ours("moe", n_dense_layers=1, d_mlp_dense=48)
    assert frame_of(dense_first, [2], [5], 2, 6, **options).d_mlp == 48
