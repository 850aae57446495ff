"""Every method against TransformerLens' own cache, on the same model and the same run."""

import functools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastlens.cache import ActivationCache
from tests.close import assert_close_to
from tests.configs import tiny

pytestmark = pytest.mark.tl

BATCH, POS, D_MODEL = 2, 5, 32
NAMES = {
    "gpt2": tiny("gpt2"),
    "gpt2_folded": tiny("gpt2", normalization_type="LNPre"),
    "llama": tiny("llama"),
    "llama_folded": tiny("llama", normalization_type="RMSPre"),
    "neox": tiny("neox"),
    "attn_only": tiny("attn_only"),
    "no_norm": tiny("no_norm"),
    "solu_ln": tiny("solu_ln"),
    "alibi": tiny("alibi"),
    "post_norm": tiny("post_norm"),
    "qk_norm": tiny("qk_norm"),
    "post_embedding_ln": tiny("post_embedding_ln"),
    "shortformer": tiny("shortformer"),
    "attn_result": tiny("llama", use_attn_result=True),
}
TO_MLP = [n for n, c in NAMES.items() if not (c.get("attn_only") or c.get("parallel_attn_mlp"))]
WITH_MLP = [n for n, c in NAMES.items() if not c.get("attn_only")]

many = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def tl():
    return pytest.importorskip("transformer_lens")


@functools.cache
def build(name: str, with_batch: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model with no parameter at a special value, and TransformerLens' cache of it."""
    import transformer_lens

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        cfg = transformer_lens.HookedTransformerConfig(**{**NAMES[name], "dtype": dtype})
        model = transformer_lens.HookedTransformer(cfg)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.randint(0, cfg.d_vocab, (BATCH if with_batch else 1, POS))
        _, cache = model.run_with_cache(tokens)
    return model, cache if with_batch else cache.remove_batch_dim()


def both(
    name: str, with_batch: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[ActivationCache, Any]:
    model, theirs = build(name, with_batch, dtype)
    # TransformerLens adds hook_result to its cache when asked for heads.
    theirs.cache_dict = {
        key: value
        for key, value in theirs.cache_dict.items()
        if not key.endswith("hook_result") or model.cfg.use_attn_result
    }
    return ActivationCache(dict(theirs.cache_dict), model, has_batch_dim=with_batch), theirs


def same(ours: Any, theirs: Any) -> None:
    """Equal labels and values."""
    if isinstance(theirs, tuple):
        assert ours[1] == theirs[1]
        ours, theirs = ours[0], theirs[0]
    assert ours.dtype == theirs.dtype
    assert_close_to(ours, theirs, atol=1e-12 if ours.dtype == torch.float64 else 5e-5)


def same_call(
    name: str, with_batch: bool, method: str, *args: Any, dtype=torch.float64, **kwargs: Any
) -> None:
    ours, theirs = both(name, with_batch, dtype)
    same(
        getattr(ours, method)(*args, **kwargs),
        getattr(theirs, method)(*args, **kwargs),
    )


names = st.sampled_from(sorted(NAMES))
flag = st.booleans()
layers = st.sampled_from([None, -1, 0, 1, 2])
layers_above = st.sampled_from([None, -1, 1, 2])
pos_slices = st.none() | st.sampled_from(
    [2, -1, (1, 4), (None, None, 2), (3,), [0, 3], [True, False, True, False, True]]
)
neuron_slices = st.none() | st.sampled_from([(1, 6), (None, None, 7), [5, 0, -1], (0,), (3,)])
projections = st.sampled_from([None, 0, 1, 3])


def directions(n: int | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """None, one direction as a vector (0), or ``n`` of them as a matrix."""
    if n is None:
        return None
    generator = torch.Generator().manual_seed(n)
    shape = (D_MODEL, n) if n else (D_MODEL,)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@many
@given(names, flag, layers, flag, flag, flag, pos_slices)
def test_accumulated_resid(tl, name, with_batch, layer, incl_mid, mlp_input, apply_ln, pos):
    has_mid = name in TO_MLP
    same_call(
        name, with_batch, "accumulated_resid", layer,
        incl_mid=incl_mid and has_mid, mlp_input=mlp_input and has_mid, apply_ln=apply_ln,
        pos_slice=pos, return_labels=True,
    )  # fmt: skip


@many
@given(
    names.filter(lambda name: name != "shortformer"),
    flag, layers, flag, st.sampled_from(["all", "mlp", "attn"]), flag, pos_slices, flag,
)  # fmt: skip
def test_decompose_resid(tl, name, with_batch, layer, mlp_input, mode, apply_ln, pos, embeds):
    # TransformerLens cannot stack no rows at all.
    assume(embeds or (layer != 0 and (mode != "mlp" or name in WITH_MLP)))
    mlp_input = mlp_input and name in TO_MLP and layer in (0, 1)
    same_call(
        name, with_batch, "decompose_resid", layer,
        mlp_input=mlp_input, mode=mode, apply_ln=apply_ln, pos_slice=pos, incl_embeds=embeds,
        return_labels=True,
    )  # fmt: skip


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_compute_head_results(tl, name, with_batch):
    ours, theirs = both(name, with_batch)
    ours.compute_head_results()
    theirs.compute_head_results()
    # Without a batch axis TransformerLens mistakes its own hook_result for something stale, and
    # puts it at the end again.
    assert list(ours) == list(theirs) or (name, with_batch) == ("attn_result", False)
    assert set(ours) == set(theirs)
    for key in ours:
        same(ours[key], theirs[key])


@many
@given(names, flag, layers_above, flag, pos_slices, flag)
def test_stack_head_results(tl, name, with_batch, layer, incl_remainder, pos, apply_ln):
    same_call(
        name, with_batch, "stack_head_results", layer,
        incl_remainder=incl_remainder, pos_slice=pos, apply_ln=apply_ln, return_labels=True,
    )  # fmt: skip


@pytest.mark.parametrize("pos", [None, 1, (1, 3)])
def test_no_heads_and_no_neurons_are_an_empty_stack(tl, pos):
    for method in ("stack_head_results", "stack_neuron_results"):
        ours, theirs = both("gpt2")
        ours = getattr(ours, method)(0, pos_slice=pos, return_labels=True)
        theirs = getattr(theirs, method)(0, pos_slice=pos, return_labels=True)
        assert ours[0].shape == theirs[0].shape and ours[1] == theirs[1] == []


@pytest.mark.parametrize(
    ("name", "part"), [("q", None), ("pattern", "attn"), ("scale", "ln1"), ("resid_pre", None)]
)
def test_stack_activation(tl, name, part):
    for layer in (-1, None, 1, 2):
        same_call("llama", True, "stack_activation", name, layer, part)


@many
@given(
    st.sampled_from(WITH_MLP), flag, st.sampled_from([0, 1, -1]), neuron_slices, pos_slices,
    projections,
)  # fmt: skip
def test_get_neuron_results(tl, name, with_batch, layer, neurons, pos, project):
    same_call(
        name, with_batch, "get_neuron_results", layer,
        neuron_slice=neurons, pos_slice=pos, project_output_onto=directions(project),
    )  # fmt: skip
    if project is None:
        same_call(name, with_batch, "get_neuron_results", layer, neuron_slice=3, pos_slice=pos)


@many
@given(
    st.sampled_from(WITH_MLP), flag, layers_above, neuron_slices, pos_slices, flag, flag,
    projections,
)  # fmt: skip
def test_stack_neuron_results(
    tl, name, with_batch, layer, neurons, pos, incl_remainder, apply_ln, project
):
    # TransformerLens looks for a scale that a model without norms does not have.
    assume(not (name == "no_norm" and apply_ln and project is not None))
    same_call(
        name, with_batch, "stack_neuron_results", layer,
        pos_slice=pos, neuron_slice=neurons, return_labels=True, incl_remainder=incl_remainder,
        apply_ln=apply_ln, project_output_onto=directions(project),
    )  # fmt: skip


@many
@given(
    names.filter(lambda name: name not in ("shortformer", "post_norm")),
    flag, layers, flag, flag, flag, pos_slices, projections,
)  # fmt: skip
def test_get_full_resid_decomposition(
    tl, name, with_batch, layer, mlp_input, expand, apply_ln, pos, project
):
    mlp_input = mlp_input and name in TO_MLP and layer in (0, 1)
    # Where TransformerLens fails: biases of MLPs that are not there, a scale that is not there.
    expand = expand and name in WITH_MLP
    assume(not (name == "no_norm" and expand and apply_ln and project is not None))
    # And where it takes the scale of ln1 for the input of the MLP.
    assume(not (mlp_input and expand and apply_ln and project is not None))
    same_call(
        name, with_batch, "get_full_resid_decomposition", layer,
        mlp_input=mlp_input, expand_neurons=expand, apply_ln=apply_ln, pos_slice=pos,
        return_labels=True,
        # TransformerLens sums biases in float32, and cannot project them in a float64 model.
        project_output_onto=directions(project, torch.float32), dtype=torch.float32,
    )  # fmt: skip


@many
@given(
    names.filter(lambda name: name != "no_norm"), layers, flag, pos_slices,
    st.none() | st.sampled_from([0, (1,), [1, 0]]), flag,
)  # fmt: skip
def test_apply_ln_to_stack(tl, name, layer, mlp_input, pos, batch, recompute):
    ours, _ = both(name)
    mlp_input = mlp_input and name in WITH_MLP and layer in (0, 1)
    stack = ours.accumulated_resid(pos_slice=pos)
    same_call(
        name, True, "apply_ln_to_stack", stack, layer,
        mlp_input=mlp_input, pos_slice=pos, batch_slice=batch,
        # TransformerLens takes what is left of a sliced batch for positions; the values agree.
        recompute_ln=recompute and not (batch == 0 and pos is None),
    )  # fmt: skip


tokens_for_all = st.sampled_from([7, torch.tensor(7), torch.tensor([7])])
tokens_per_place = st.builds(
    lambda seed: torch.randint(0, 50, (BATCH, POS), generator=torch.Generator().manual_seed(seed)),
    st.integers(0, 9),
)


@many
@given(names, flag, pos_slices, tokens_for_all, st.booleans())
def test_logit_attrs_of_one_token(tl, name, with_batch, pos, token, has_wrong):
    ours, _ = both(name, with_batch)
    stack = ours.accumulated_resid(pos_slice=pos)
    wrong = None
    if has_wrong:
        wrong = torch.full_like(token, 3) if isinstance(token, Tensor) else 3
    same_call(
        name, with_batch, "logit_attrs", stack, token, wrong,
        pos_slice=pos, has_batch_dim=with_batch,
    )  # fmt: skip


@many
@given(names.filter(lambda n: n != "no_norm"), tokens_per_place, tokens_per_place, flag, pos_slices)
def test_logit_attrs_of_tokens_at_every_place(tl, name, right, wrong, has_wrong, pos):
    ours, _ = both(name)
    stack = ours.decompose_resid(pos_slice=pos) if name != "shortformer" else None
    assume(stack is not None)
    if pos is not None:
        index = slice(*pos) if isinstance(pos, tuple) else pos
        right, wrong = right[:, index], wrong[:, index]
    for batch in (None, 1, (0, 1)):
        chosen = slice(None) if batch is None else slice(*batch) if batch != 1 else 1
        same_call(
            name, True, "logit_attrs", stack, right[chosen], wrong[chosen] if has_wrong else None,
            pos_slice=pos, batch_slice=batch,
        )  # fmt: skip


@pytest.mark.parametrize("chosen", [0, (1, 2), [1, 0]])
def test_methods_of_a_sliced_batch(tl, chosen):
    ours, theirs = both("gpt2")
    ours, theirs = (cache.apply_slice_to_batch_dim(chosen) for cache in (ours, theirs))
    assert list(ours) == list(theirs) and ours.has_batch_dim == theirs.has_batch_dim
    for method in ("accumulated_resid", "decompose_resid", "stack_head_results"):
        same(
            getattr(ours, method)(return_labels=True, apply_ln=True),
            getattr(theirs, method)(return_labels=True, apply_ln=True),
        )


def test_keys_of_every_form(tl):
    ours, theirs = both("llama")
    for key in ("q1", "scale", ("k", 0), ("scale", -1, "ln2"), ("attn", -2), *theirs):
        assert ours[key] is theirs[key]
    assert list(ours.keys()) == list(theirs.keys()) and len(ours) == len(theirs)
