import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlens.act_names import get_act_name


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (("embed",), "hook_embed"),
        (("pos_embed",), "hook_pos_embed"),
        (("hook_embed",), "hook_embed"),
        (("blocks.1.attn.hook_k",), "blocks.1.attn.hook_k"),
        (("resid_pre", 3), "blocks.3.hook_resid_pre"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("k3",), "blocks.3.attn.hook_k"),
        (("key", 2), "blocks.2.attn.hook_k"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("pattern", 0, "attn"), "blocks.0.attn.hook_pattern"),
        (("attn_logits", 0), "blocks.0.attn.hook_attn_scores"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("mlp_post", 2), "blocks.2.mlp.hook_post"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("normalized", 1, "ln2"), "blocks.1.ln2.hook_normalized"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("scale",), "ln_final.hook_scale"),
        (("resid_pre", 3, "block"), "blocks.3.hook_resid_pre"),
        (("expert_weights", 3, "m"), "blocks.3.mlp.hook_expert_weights"),
        (("resid_post", -1), "blocks.-1.hook_resid_post"),
    ],
)
def test_examples(asked: tuple, name: str):
    assert get_act_name(*asked) == name


activations = st.sampled_from(
    "embed pos_embed q k v z rot_q rot_k result pattern attn attn_scores attn_logits key query"
    " value pre post mid pre_linear mlp_pre mlp_mid mlp_post scale normalized resid_pre resid_mid"
    " attn_out mlp_out q_input tokens".split()
)
names = (
    activations
    | st.builds("{}{}{}".format, activations, st.integers(0, 99), st.sampled_from(["", "ln1", "m"]))
    | st.builds("{}{}".format, st.sampled_from(["hook_", "blocks.1.", "k."]), activations)
    | st.text("abk_.0139 ", max_size=8)
)
layers = st.none() | st.integers(-3, 99) | st.sampled_from(["4"])
parts = st.none() | st.sampled_from(
    ["a", "m", "b", "block", "blocks", "attention", "attn", "mlp", "ln1", "ln2", "ln1_post", ""]
)


@pytest.fixture(scope="module")
def tl():
    return pytest.importorskip("transformer_lens.utilities")


@pytest.mark.tl
@given(names, layers, parts)
def test_same_as_transformer_lens(tl, name, layer, part):
    assert get_act_name(name, layer, part) == tl.get_act_name(name, layer, part)
