"""Families refuse what they do not account for, all of it in one error."""

from pathlib import Path

import pytest

from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, WeightsError
from fastlens.weights import family as module
from fastlens.weights.family import FAMILIES, Place, family_of
from tests.weights.checkpoints import hf_model

FAMILIES_FOLDER = Path(module.__file__).parent / "families"
GROUPED_EXPERTS = HookedTransformerConfig(
    d_model=8, d_head=2, n_layers=4, n_ctx=4, d_vocab=5, n_key_value_heads=2, num_experts=2,
    experts_per_token=1, device="cpu",
)  # fmt: skip
LLAMA = FAMILIES.get("llama")
GPT2 = FAMILIES.get("gpt2")


def config(case: str = "llama_grouped", **changes) -> dict:
    return {**hf_model(case).config.to_dict(), **changes}


def shapes(case: str = "llama_grouped") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in hf_model(case).state_dict().items()}


def test_families_are_found_not_listed():
    files = {path.stem for path in FAMILIES_FOLDER.glob("[!_]*.py")}
    assert set(FAMILIES.names()) == files >= {"bert", "gpt2", "gpt_neox", "llama", "mistral", "t5"}
    # Named as transformers' model_type.
    assert all(family.name.replace("-", "_") == name for name, family in FAMILIES.entries.items())


def test_tables_are_short():
    """Half of them in 80 lines, every one in 160: a table is read, not studied."""
    files = FAMILIES_FOLDER.glob("[!_]*.py")
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines[len(lines) // 2] <= 80 and lines[-1] <= 160


@pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.name)
def test_tables_are_whole(family):
    """Every parameter has one key (or alternatives), and every switch is used."""
    for pattern, key in family.keys.items():
        if key is not None:
            targets = key.targets(Place(pattern, 3, 1), GROUPED_EXPERTS)
            layers = ("blocks.3.", "encoder.3.", "decoder.3.")
            assert ("{l}" in pattern) == all(name.startswith(layers) for name in targets)
            assert key.when is None or callable(key.when) or key.when in family.switches
    for table in family.gguf.values():
        known = {pattern.rsplit(".", 1)[0] for pattern in family.keys}
        assert {name for name in table.names.values() if name is not None} <= known
        assert set(table.undo) <= set(family.keys)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"sliding_window": 7}, "sliding_window=7"),
        ({"a": 1, "b": [2]}, r"a=1, b=\[2\]"),
        # Known to transformers, but not at its default.
        ({"chunk_size_feed_forward": 0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unknown_attributes_are_refused(changes, named):
    with pytest.raises(ConfigError, match=f"llama family does not account for .*{named}"):
        LLAMA.config_fields(config(**changes))


def test_what_says_nothing_is_accepted(monkeypatch):
    plain = LLAMA.config_fields(config())
    null = config(anything=None, _private=3, torch_dtype="float16", transformers_version="4.0")
    assert LLAMA.config_fields(null) == plain
    # An attribute outside every table, at transformers' own default.
    assert module._default_config("LlamaConfig")["chunk_size_feed_forward"] == 0
    monkeypatch.setattr(module, "HARMLESS", module.HARMLESS - {"chunk_size_feed_forward"})
    LLAMA.config_fields(config(chunk_size_feed_forward=0))
    with pytest.raises(ConfigError, match="chunk_size_feed_forward=1"):
        LLAMA.config_fields(config(chunk_size_feed_forward=1))


def test_only_one_value_is_known():
    LLAMA.config_fields(config(rope_interleaved=False))
    with pytest.raises(ConfigError, match="rope_interleaved=True"):
        LLAMA.config_fields(config(rope_interleaved=True))
    with pytest.raises(ConfigError, match="add_cross_attention=True"):
        GPT2.config_fields(config("gpt2", add_cross_attention=True))


def test_quantised_weights_are_refused():
    quantised = config(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"stored quantised \(gptq\)"):
        LLAMA.config_fields(quantised)


def test_all_tensor_problems_are_listed_at_once():
    found = shapes()
    del found["model.layers.1.mlp.up_proj.weight"], found["model.norm.weight"]
    found["model.layers.0.self_attn.q_proj.weight"] = (31, 32)
    found |= {"model.layers.7.input_layernorm.weight": (32,), "model.vision.weight": (1, 2)}
    with pytest.raises(WeightsError) as error:
        LLAMA.plan(found, config())
    message = str(error.value)
    for part in (
        "(5 problems)",
        "missing: model.layers.1.mlp.up_proj.weight",
        "missing: model.norm.weight",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is [31, 32], expected [32, 32]",
        "unknown: model.layers.7.input_layernorm.weight [32]",
        "unknown: model.vision.weight [1, 2]",
    ):
        assert part in message


def test_long_lists_are_cut():
    with pytest.raises(WeightsError, match="and 3 more"):
        LLAMA.plan({**shapes(), **{f"x{n}": (1,) for n in range(33)}}, config())


def test_a_tensor_of_a_switch_that_is_off_is_unknown():
    found = {**shapes(), "model.layers.0.self_attn.q_proj.bias": (32,)}
    with pytest.raises(WeightsError, match="unknown: .*q_proj.bias"):
        LLAMA.plan(found, config())
    with pytest.raises(WeightsError, match="missing: .*o_proj.bias"):
        LLAMA.plan(shapes(), config(attention_bias=True))


def test_tied_embeddings():
    found = shapes("llama_tied")
    del found["lm_head.weight"]
    plan = LLAMA.plan(found, config("llama_tied"))
    assert [(name, targets) for name, _, targets in plan["unembed"]] == [
        ("model.norm.weight", ("ln_final.w",)),
        ("model.embed_tokens.weight", ("unembed.W_U",)),
    ]
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        LLAMA.plan(found, config("llama_tied", tie_word_embeddings=False))
    untold = config("gpt2")
    del untold["tie_word_embeddings"]
    gpt2 = {name: shape for name, shape in shapes("gpt2").items() if "lm_head" not in name}
    assert "wte" in GPT2.plan(gpt2, untold)["unembed"][-1][0]


def test_groups_come_in_loading_order():
    plan = LLAMA.plan(dict(reversed(shapes().items())), config())
    assert list(plan) == ["unembed", "embed", "blocks.0", "blocks.1", "blocks.2"]


def test_the_family_of_a_config():
    assert family_of({"architectures": ["LlamaForCausalLM"]}) == (LLAMA, "LlamaForCausalLM")
    assert family_of({"model_type": "gpt2"})[1] == "GPT2LMHeadModel"
    with pytest.raises(ConfigError, match=r"is MambaModel\. fastlens can load .*HookedModule"):
        family_of({"architectures": ["MambaModel"], "model_type": "gpt2"})
    with pytest.raises(ConfigError, match="none, model_type='mamba'"):
        family_of({"model_type": "mamba"})


def test_reading_a_config_of_its_own_needs_no_transformers():
    """Everything in a usual config is in the tables, so defaults need not be asked for."""
    module._default_config.cache_clear()
    for name, case in (("llama", "llama_grouped"), ("gpt2", "gpt2"), ("gpt_neox", "neox")):
        FAMILIES.get(name).config_fields(hf_model(case).config.to_diff_dict())
    assert module._default_config.cache_info().currsize == 0


def test_tensors_of_experts_are_counted_one_by_one():
    """As files have them, one each; as transformers has them in memory, one for all."""
    mixtral = FAMILIES.get("mixtral")
    stated = {
        "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_local_experts": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5,
        "max_position_embeddings": 4,
    }  # fmt: skip
    layer, moe = "model.layers.0.", "model.layers.0.block_sparse_moe."
    shared = {
        "model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,), "lm_head.weight": (5, 8),
        **{f"{layer}self_attn.{x}_proj.weight": (rows, 8) for x, rows in zip("qkvo", (8, 4, 4, 8),
                                                                             strict=True)},
        f"{layer}input_layernorm.weight": (8,), f"{layer}post_attention_layernorm.weight": (8,),
    }  # fmt: skip
    files = {
        **shared, f"{moe}gate.weight": (2, 8),
        **{f"{moe}experts.{e}.{name}.weight": (8, 6) if name == "w2" else (6, 8)
           for e in range(2) for name in ("w1", "w2", "w3")},
    }  # fmt: skip
    memory = {
        **shared, f"{layer}mlp.gate.weight": (2, 8),
        f"{layer}mlp.experts.gate_up_proj": (2, 12, 8), f"{layer}mlp.experts.down_proj": (2, 8, 6),
    }  # fmt: skip
    made = []
    for tensors in (files, memory):
        plan = mixtral.plan(tensors, stated)
        made.append({name for _, _, names in plan["blocks.0"] for name in names})
    assert made[0] == made[1] and len(made[0]) == 13
    assert "blocks.0.mlp.experts.1.W_gate.weight" in made[0]
    first = mixtral.plan(memory, stated)["blocks.0"]
    assert next(names for name, _, names in first if "gate_up" in name) == tuple(
        f"blocks.0.mlp.experts.{e}.{weight}.weight" for e in (0, 1) for weight in ("W_gate", "W_in")
    )
    files[f"{moe}experts.2.w1.weight"] = files.pop(f"{moe}experts.1.w1.weight")
    with pytest.raises(WeightsError, match=r"unknown: .*experts\.2\.w1.weight \[6, 8\]") as error:
        mixtral.plan(files, stated)
    assert "missing: model.layers.0.mlp.experts.1.gate_proj.weight" in str(error.value)
