"""Rotary tables against Hugging Face's and against TransformerLens' formula in float64."""

import pytest
import torch

from fastlens import HookedTransformer, TransformerLensKeyValueCache
from fastlens.components.rotary_tables import rotary_tables, table_rows, turns_long
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, ShapeError
from tests.close import assert_close_to
from tests.configs import tiny
from tests.models import prompts, randomise

SIZES = {"n_layers": 1, "d_model": 16, "n_ctx": 16, "d_head": 8, "d_vocab": 5, "act_fn": "relu",
         "positional_embedding_type": "rotary", "device": "cpu"}  # fmt: skip
SCALINGS = {
    "default": ({}, {"rope_type": "default"}),
    "linear": (
        {"rotary_scaling_factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "llama3": (
        {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": 8.0,
            "NTK_original_ctx_len": 64,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        {
            "use_yarn_rope": True,
            "yarn_factor": 4.0,
            "yarn_attention_factor": 1.2,
            "yarn_original_max_position_embeddings": 64,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.2,
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_hugging_face(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours, theirs = SCALINGS[name]
    n_ctx = 256
    hf = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=n_ctx,
            rope_parameters={"rope_theta": 10000.0, **theirs},
        )
    )
    hf_cos, hf_sin = hf(torch.zeros(1), torch.arange(n_ctx)[None])
    cfg = HookedTransformerConfig(**tiny("llama", d_head=16, rotary_dim=16, **ours))
    sin, cos = rotary_tables(cfg, n_ctx, torch.float32)
    assert_close_to(cos, hf_cos[0], atol=1e-6)
    assert_close_to(sin, hf_sin[0], atol=1e-6)


def test_adjacent_pairs_interleave_and_local_layers_have_their_base():
    cfg = HookedTransformerConfig(
        **tiny("llama", rotary_adjacent_pairs=True, rotary_base_local=100, rotary_scaling_factor=2)
    )
    sin, _ = rotary_tables(cfg, 4, torch.float64)
    assert torch.equal(sin[:, 0::2], sin[:, 1::2])
    local, _ = rotary_tables(cfg, 4, torch.float64, is_local=True)
    angle = 3 * 100 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert_close_to(local[3, 0::2], angle.sin(), atol=1e-12)


def test_layers_share_the_work_and_not_the_table():
    cfg = HookedTransformerConfig(**SIZES, rotary_dim=8)
    first, second = (rotary_tables(cfg, 16, torch.float32) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        a.zero_()
        assert not torch.equal(a, b)
    other = HookedTransformerConfig(**SIZES, rotary_dim=8, rotary_base=500)
    assert not torch.equal(rotary_tables(other, 16, torch.float32)[0], second[0])
    assert rotary_tables(cfg, 16, torch.bfloat16)[0].dtype == torch.bfloat16


def test_tables_without_numbers():
    with torch.device("meta"):
        sin, cos = rotary_tables(HookedTransformerConfig(**SIZES, rotary_dim=8), 16, torch.float32)
    assert sin.is_meta
    assert cos.shape == (16, 8)


def longrope(**changes):
    return HookedTransformerConfig(
        **tiny(
            "llama",
            longrope_short_factor=[1.0, 1.5, 2.0, 3.0],
            longrope_long_factor=[2.0, 4.0, 8.0, 16.0],
            longrope_original_ctx_len=5,
            longrope_attention_factor=1.25,
            **changes,
        )
    )


def test_longrope_tables_hold_short_texts_then_long_ones():
    cfg = longrope()
    plain = HookedTransformerConfig(**tiny("llama"))
    sin, _ = rotary_tables(cfg, 12, torch.float64)
    steps = torch.arange(4, dtype=torch.float64) / 4
    for rows, factors in ((sin[:5], [1, 1.5, 2, 3]), (sin[5:], [2, 4, 8, 16])):
        angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * (
            10000.0**-steps / torch.tensor(factors, dtype=torch.float64)
        )
        assert_close_to(rows[:, :4], 1.25 * angles.sin(), atol=1e-12)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    lengths = torch.tensor([6, 3])
    assert table_rows(cfg, positions, lengths).tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 1, 2]]
    assert table_rows(plain, positions, lengths) is positions


def test_longrope_of_a_text_is_decided_by_its_own_length():
    model = HookedTransformer(longrope(dtype=torch.float64)).eval()
    randomise(model)
    tokens, mask = prompts(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        both = model(tokens, attention_mask=mask)
        assert_close_to(both[:1], model(tokens[:1]), atol=1e-12)
        assert_close_to(both[1:, 4:], model(tokens[1:, 4:]), atol=1e-12)
        # A short beginning of a long text is turned otherwise than the same text alone.
        assert not torch.allclose(both[:1, :3], model(tokens[:1, :3]))


def test_a_kv_cache_does_not_turn_into_a_long_texts():
    """In all layers but the first its keys were made with the other frequencies."""
    model = HookedTransformer(longrope(dtype=torch.float64)).eval()
    randomise(model)
    tokens = prompts(2, 9)
    with torch.no_grad():
        for start, mask in ((4, None), (7, torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))):
            past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
            first = {} if mask is None else {"attention_mask": mask[:, :start]}
            rest = {} if mask is None else {"attention_mask": mask[:, start:]}
            model(tokens[:, :start], past_kv_cache=past, **first)
            with pytest.raises(ShapeError, match="of 4 tokens in a KV cache goes on beyond 5"):
                model(tokens[:, start:], past_kv_cache=past, **rest)
        # From one long text to a longer one nothing changes.
        past = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(tokens[:, :6], past_kv_cache=past)
        assert_close_to(model(tokens[:, 6:], past_kv_cache=past), model(tokens)[:, 6:], atol=1e-12)
    lengths = torch.tensor([0, 2, 5, 6])
    assert turns_long(model.cfg, lengths, lengths + 4).tolist() == [False, True, True, False]


def test_generation_runs_a_text_that_turned_long_again():
    model = HookedTransformer(longrope()).eval()
    randomise(model)
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "output_logits": True}
    embeds = model.embed(prompts(2, 3))
    for prompt in (prompts(2, 3), embeds):
        kinds = {"return_type": "tokens"}
        found = model.generate(prompt, 6, **options, **kinds)
        wanted = model.generate(prompt, 6, use_past_kv_cache=False, **options, **kinds)
        for one, other in zip(found.logits, wanted.logits, strict=True):
            assert_close_to(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"longrope_long_factor": None}, "longrope_short_factor has 4 entries and"),
        ({"longrope_short_factor": [1.0]}, "each of the 4 rotary frequencies"),
        ({"use_yarn_rope": True}, "another scaling"),
        ({"rotary_scaling_factor": 2.0}, "another scaling"),
    ],
)
def test_longrope_fields_fit_together(changes, words):
    fields = {
        "longrope_short_factor": [1.0] * 4, "longrope_long_factor": [2.0] * 4, **changes
    }  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        HookedTransformerConfig(**tiny("llama", **fields))
