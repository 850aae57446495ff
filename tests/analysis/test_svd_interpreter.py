"""`SVDInterpreter` against TransformerLens' up to sign, and against the matrices themselves."""

import inspect

import pytest
import torch

from fastlens.analysis import svd_interpreter
from fastlens.analysis.svd_interpreter import SVDError, SVDInterpreter
from tests.close import assert_close_to, assert_no_worse
from tests.models import ours
from tests.toy import ours_toy, theirs_of

COMPARED = [
    "transformer_lens.SVDInterpreter.OUTPUT_EMBEDDING",
    "transformer_lens.SVDInterpreter.SVDInterpreter",
    "transformer_lens.SVDInterpreter.SVDInterpreter.get_singular_vectors",
    "transformer_lens.SVDInterpreter.VECTOR_TYPES",
]
ASKED = [("OV", 3), ("w_in", None), ("w_out", None)]


def assert_same_up_to_sign(got, want, atol=2e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    signs = (got * want).sum(0, keepdim=True).sign()
    assert (signs != 0).all()
    assert_close_to(got * signs, want, atol=atol)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "no_norm", "post_norm", "folded"])
def test_as_transformer_lens(name):
    transformer_lens = pytest.importorskip("transformer_lens")
    changes = {"normalization_type": "LNPre"} if name == "folded" else {}
    a = ours("gpt2" if name == "folded" else name, **changes)
    b = theirs_of(a)
    first, second = SVDInterpreter(a), transformer_lens.SVDInterpreter(b)
    for kind, head in ASKED:
        if kind == "OV" and a.cfg.n_key_value_heads is not None:
            continue  # TransformerLens raises KeyError there
        for layer in (0, 1):
            for n in (1, 8):
                got = first.get_singular_vectors(kind, layer, n, head)
                assert_same_up_to_sign(got, second.get_singular_vectors(kind, layer, n, head))
    got = first.get_singular_vectors("w_in", layer_index=0)
    assert got.shape == (50, 1, 10)
    assert_same_up_to_sign(got, second.get_singular_vectors("w_in", layer_index=0))


@pytest.mark.tl
def test_the_toy_model_as_transformer_lens():
    transformer_lens = pytest.importorskip("transformer_lens")
    a = ours_toy()
    want = transformer_lens.SVDInterpreter(theirs_of(a)).get_singular_vectors("OV", 1, 10, 0)
    got = SVDInterpreter(a).get_singular_vectors("OV", 1, head_index=0)
    assert SVDInterpreter(a).params.keys() == dict(a.named_parameters()).keys()
    # Two singular values are close together, so both have some error.
    double = a.to(torch.float64, print_details=False)
    truth = SVDInterpreter(double).get_singular_vectors("OV", 1, head_index=0)
    got, want = (x * (x * truth).sum(0, keepdim=True).sign().float() for x in (got, want))
    assert_no_worse(got, want, truth)


@pytest.mark.tl
def test_names_as_transformer_lens():
    pytest.importorskip("transformer_lens")
    import importlib

    theirs = importlib.import_module("transformer_lens.SVDInterpreter")
    assert theirs.VECTOR_TYPES == svd_interpreter.VECTOR_TYPES
    assert theirs.OUTPUT_EMBEDDING == svd_interpreter.OUTPUT_EMBEDDING
    method = "get_singular_vectors"
    signatures = [
        inspect.signature(getattr(cls, method)).parameters.values()
        for cls in (SVDInterpreter, theirs.SVDInterpreter)
    ]
    got, want = ([(p.name, p.default, p.kind) for p in each] for each in signatures)
    assert got == want


@pytest.mark.parametrize("name", ["gpt2", "llama", "post_norm"])
def test_they_are_singular_vectors(name):
    """``M v`` has the length of the singular value, and the logits are those of ``v``."""
    model = ours(name, dtype=torch.float64).double()
    model.unembed.W_U.data = torch.eye(32, 50, dtype=torch.float64)  # logits are the vector
    block = model.blocks[1]
    matrices = {
        "OV": block.attn.W_V[3] @ block.attn.W_O[3],
        "w_in": block.mlp.W_in.T * block.ln2.w,
        "w_out": block.mlp.W_out,
    }
    for kind, head in ASKED:
        vectors = SVDInterpreter(model).get_singular_vectors(kind, 1, 8, head)[:32, 0]
        assert vectors.dtype == torch.float64
        assert_close_to(vectors.T @ vectors, torch.eye(8, dtype=torch.float64))
        lengths = (matrices[kind] @ vectors).norm(dim=0)
        assert_close_to(lengths, torch.linalg.svdvals(matrices[kind])[:8])


def test_16_bit_weights():
    model = ours("gpt2")
    want = SVDInterpreter(model).get_singular_vectors("w_out", 0, 3)
    got = SVDInterpreter(model.to(torch.bfloat16, print_details=False)).get_singular_vectors(
        "w_out", 0, 3
    )
    assert_same_up_to_sign(got, want, atol=0.05)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("ov", 0, 3, 0), "vector_type='ov' must be one of"),
        (("OV", 3, 3, 0), "layer_index=3 must be 0 to 2"),
        (("w_in", -1), "layer_index=-1"),
        (("OV", 0, 3, 4), "head_index=4 must be 0 to 3"),
        (("OV", 0, 3), "'OV' needs head_index"),
        (("OV", 0, 9, 0), "num_vectors=9 must be 1 to 8"),
        (("w_out", 0, 33), "num_vectors=33 must be 1 to 32"),
        (("w_out", 0, 0), "num_vectors=0"),
    ],
)
def test_what_is_refused(asked, message):
    with pytest.raises(SVDError, match=message) as caught:
        SVDInterpreter(ours("gpt2")).get_singular_vectors(*asked)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, ValueError)


def test_blocks_without_mlp():
    with pytest.raises(SVDError, match="'w_in' is of an MLP"):
        SVDInterpreter(ours("attn_only")).get_singular_vectors("w_in", 0)


def test_a_norm_behind_the_mlp_is_no_part_of_what_it_reads():
    model = ours("olmo2")
    _, _, directions = torch.linalg.svd(model.blocks[0].mlp.W_in.detach().mT, full_matrices=False)
    want = (directions[:3] @ model.W_U.detach()).T[:, None]
    got = SVDInterpreter(model).get_singular_vectors("w_in", 0, 3)
    assert_same_up_to_sign(got.detach(), want)
