"""TransformerLens' patching functions: its values, shapes and arguments; custom setters; errors.

`one_by_one` is the engine as it must behave: every run is one `run_with_hooks`. The comparisons are
made with it, which judges this module alone, and with the real engine.
"""

import functools
import importlib
import inspect
import sys
import warnings

import pytest
import torch

from fastlens.errors import HookNameError, MetricError, PatchIndexError, ShapeError, SweepError
from fastlens.patching import get_act_patch, metrics, patch_setters
from fastlens.patching.sites import SITES
from tests.close import assert_close_to
from tests.models import ours, prompts, theirs

pandas = pytest.importorskip("pandas")
# The package has a function of the same name.
ENGINE = importlib.import_module("fastlens.patching.sweep")
BATCH, POS = 2, 5
PARTIALS = [
    name
    for name in get_act_patch.__all__
    if isinstance(getattr(get_act_patch, name), functools.partial)
]
EVERY = [name for name in get_act_patch.__all__ if name.endswith("_every")]
# Blocks with no MLP, or with attention and MLP side by side, lack some places.
LACKS = {
    "attn_only": {"get_act_patch_resid_mid", "get_act_patch_mlp_out", "get_act_patch_block_every"},
    "neox": {"get_act_patch_resid_mid"},
}
# Where block types differ from those two.
SOME = [
    "get_act_patch_resid_mid",
    "get_act_patch_mlp_out",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_block_every",
]
CASES = [(name, function) for name in ("gpt2", "llama") for function in PARTIALS + EVERY]
CASES += [(name, function) for name in ("attn_only", "neox") for function in SOME]
SETTERS = [setter.__name__ for setter in patch_setters.SELECTIONS]


def metric(logits):
    return (logits[:, -1, 3] - 2 * logits[:, -2, 7]).mean()


def one_by_one(model, tokens, runs, metric, *, progress=True):
    """The engine's contract, plainly: all patches of a run at once, one forward per run."""

    def hook_of(patch):
        site = SITES[patch.site]
        clean = patch.source[site.hook_name(patch.layer)]
        entry = {"pos": patch.pos, "query_pos": patch.pos, "key_pos": patch.key_pos}
        entry |= {"head": patch.head, "neuron": patch.neuron}
        chosen = [slice(None) if entry[axis] is None else entry[axis] for axis in site.axes]
        where = (slice(None), *chosen)
        assert patch.mode == "replace"

        def replace(activation, hook):
            assert clean.shape == activation.shape
            patched = activation.clone()
            patched[where] = clean[where]
            return patched

        return site.hook_name(patch.layer), replace

    values = []
    for patches in runs:
        logits = model.run_with_hooks(tokens, fwd_hooks=[hook_of(patch) for patch in patches])
        values.append(metric(logits))
        assert values[-1].shape == ()
    return torch.stack(values).detach()


class Recorder:
    """`one_by_one`, and what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, tokens, runs, metric, *, progress=True):
        self.calls.append((tokens, runs, progress))
        return one_by_one(model, tokens, runs, metric, progress=progress)

    @property
    def patches(self):
        [(_, runs, _)] = self.calls
        assert all(len(run) == 1 for run in runs)
        return [run[0] for run in runs]


@pytest.fixture
def engine(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(ENGINE, "patched_metrics", recorder)
    return recorder


@pytest.fixture
def no_engine(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the engine was asked")

    monkeypatch.setattr(ENGINE, "patched_metrics", refuse)


@pytest.fixture(params=["one by one", "engine"])
def either(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(ENGINE, "patched_metrics", one_by_one)


@functools.cache
def setting(name):
    """Their model and ours with the same weights, the corrupted prompts, both clean caches."""
    pytest.importorskip("transformer_lens")
    a, b = theirs(name, n_layers=2), ours(name, n_layers=2)
    b.load_state_dict(a.state_dict())
    clean, corrupted = prompts(BATCH, POS, seed=1), prompts(BATCH, POS, seed=2)
    with torch.no_grad():
        return a, b, corrupted, a.run_with_cache(clean)[1], b.run_with_cache(clean)[1]


@functools.cache
def their_result(name, function):
    import transformer_lens.patching

    a, _, corrupted, cache, _ = setting(name)
    with torch.no_grad():
        return getattr(transformer_lens.patching, function)(a, corrupted, cache, metric)


@functools.cache
def tiny_setting(name, **changes):
    model = ours(name, n_layers=2, **changes)
    with torch.no_grad():
        cache = model.run_with_cache(prompts(BATCH, POS, seed=1))[1]
    return model, prompts(BATCH, POS, seed=2), cache


# -- equal to TransformerLens --------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize(("name", "function"), CASES)
def test_equals_transformer_lens(name, function, either):
    if function in LACKS.get(name, ()):
        _, model, corrupted, _, cache = setting(name)
        with pytest.raises(HookNameError, match="this model has no activation"):
            getattr(get_act_patch, function)(model, corrupted, cache, metric)
        return
    want = their_result(name, function)
    _, model, corrupted, _, cache = setting(name)
    got = getattr(get_act_patch, function)(model, corrupted, cache, metric)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert not got.requires_grad
    assert_close_to(got, want, atol=1e-5)
    assert float(want.std()) > 1e-3


@pytest.mark.tl
@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("activation", ["resid_pre", "mlp_post", "z", "k", "pattern"])
def test_every_setter_on_every_kind_of_activation(setter, activation, either):
    """Setters on activations they were not made for do what their indexing says, or raise."""
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("llama")
    axes = {2: "layer pos", 3: "layer pos head", 4: "layer head_index dest_pos src_pos"}
    n = 1 + len(patch_setters.SELECTIONS[getattr(patch_setters, setter)].axes)
    frame = pandas.DataFrame([[1, 1, 0, 3][:n], [0, -1, 1, 1][:n]], columns=axes[n].split())
    try:
        with torch.no_grad():
            want = their_patching.generic_activation_patch(
                a, corrupted, their_cache, metric, getattr(their_patching, setter), activation,
                index_df=frame,
            )  # fmt: skip
    except IndexError:
        want = None
    for one in (getattr(patch_setters, setter), getattr(their_patching, setter)):
        arguments = (b, corrupted, cache, metric, one, activation)
        if want is None:
            with pytest.raises(IndexError):
                get_act_patch.generic_activation_patch(*arguments, index_df=frame)
        else:
            got = get_act_patch.generic_activation_patch(*arguments, index_df=frame)
            assert_close_to(got, want, atol=1e-5)


@pytest.mark.tl
def test_arguments_are_theirs():
    their_patching = pytest.importorskip("transformer_lens.patching")
    for name in ("generic_activation_patch", "make_df_from_ranges", *SETTERS, *EVERY):
        ours_, theirs_ = (
            inspect.signature(getattr(module, name)) for module in (get_act_patch, their_patching)
        )
        assert list(ours_.parameters) == list(theirs_.parameters), name
        defaults = [p.default for p in ours_.parameters.values()]
        assert defaults == [p.default for p in theirs_.parameters.values()], name


@pytest.mark.tl
def test_names_are_theirs():
    their_patching = pytest.importorskip("transformer_lens.patching")
    imported = "annotations itertools partial einops pd torch tqdm utils Float Int".split()
    imported += "ActivationCache HookedTransformer".split()
    imported += "Callable Optional Sequence Tuple Union Literal overload".split()
    names = {n for n in vars(their_patching) if not n.startswith("_")} - set(imported)
    assert len(PARTIALS) == 15
    assert names == set(get_act_patch.__all__) - {"CleanCache"}
    for name in get_act_patch.__all__:
        assert hasattr(get_act_patch, name)


@pytest.mark.tl
@pytest.mark.parametrize("function", PARTIALS)
def test_partials_can_be_looked_into(function):
    their_patching = pytest.importorskip("transformer_lens.patching")
    mine, wanted = getattr(get_act_patch, function), getattr(their_patching, function)
    assert mine.func is get_act_patch.generic_activation_patch
    assert mine.args == wanted.args == ()
    for key in ("activation_name", "index_axis_names"):
        assert mine.keywords[key] == wanted.keywords[key]
    setter = mine.keywords["patch_setter"]
    assert setter is getattr(patch_setters, wanted.keywords["patch_setter"].__name__)
    assert set(mine.keywords) == set(wanted.keywords)
    assert mine.keywords["activation_name"] in mine.__doc__


@pytest.mark.tl
def test_a_frame_of_indices(either):
    """Rows in any order, twice the same, columns of any name, positions from the end."""
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("llama")
    rows = [[1, 3, 0], [0, 0, 1], [1, 3, 0], [1, -1, 1], [0, -5, -2]]
    frame = pandas.DataFrame(rows, columns=["layer", "where", "who"], index=[7, 7, 1, 0, 3])
    changed = {"index_axis_names": None, "index_df": frame}
    with torch.no_grad():
        want = their_patching.get_act_patch_attn_head_v_by_pos(
            a, corrupted, their_cache, metric, **changed
        )
    got = get_act_patch.get_act_patch_attn_head_v_by_pos(b, corrupted, cache, metric, **changed)
    assert (got.shape, got.dtype) == (want.shape, want.dtype) == ((5,), torch.float32)
    assert_close_to(got, want, atol=1e-5)
    got, returned = get_act_patch.get_act_patch_attn_head_v_by_pos(
        b, corrupted, cache, metric, **changed, return_index_df=True
    )
    assert returned is frame
    assert_close_to(got, want, atol=1e-5)


@pytest.mark.tl
def test_the_frame_is_returned(either):
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("llama")
    name = "get_act_patch_attn_head_k_all_pos"
    with torch.no_grad():
        want, their_frame = getattr(their_patching, name)(
            a, corrupted, their_cache, metric, return_index_df=True
        )
    got, frame = getattr(get_act_patch, name)(b, corrupted, cache, metric, return_index_df=True)
    pandas.testing.assert_frame_equal(frame, their_frame)
    assert_close_to(got, want, atol=1e-5)


@pytest.mark.tl
@pytest.mark.parametrize("kind", ["their cache", "their cache as a dict", "dict", "float64 dict"])
def test_kinds_of_clean_cache(kind, either):
    _, b, corrupted, their_cache, cache = setting("gpt2")
    given = {
        "their cache": their_cache,
        "their cache as a dict": dict(their_cache),
        "dict": dict(cache.items()),
        "float64 dict": {key: value.double() for key, value in cache.items()},
    }[kind]
    got = get_act_patch.get_act_patch_resid_pre(b, corrupted, given, metric)
    assert_close_to(got, their_result("gpt2", "get_act_patch_resid_pre"), atol=1e-5)


@pytest.mark.tl
def test_default_dtype_is_that_of_the_result(either):
    """As in TransformerLens, whatever the model's."""
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("gpt2")
    torch.set_default_dtype(torch.float64)
    frame = pandas.DataFrame({"layer": [0], "pos": [1]})
    arguments = {"index_axis_names": None, "index_df": frame}
    with torch.no_grad():
        want = their_patching.get_act_patch_attn_out(a, corrupted, their_cache, metric, **arguments)
    got = get_act_patch.get_act_patch_attn_out(b, corrupted, cache, metric, **arguments)
    assert got.dtype == want.dtype == torch.float64
    assert_close_to(got, want, atol=1e-5)


# -- what the engine is asked --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setter", "activation", "row", "expected"),
    [
        ("layer_pos_patch_setter", "resid_pre", [1, 3], {"pos": 3}),
        ("layer_pos_patch_setter", "z", [1, 3], {"pos": 3}),
        ("layer_pos_patch_setter", "resid_post", [1, -1], {"pos": 4}),
        ("layer_pos_head_vector_patch_setter", "q", [1, 3, 2], {"pos": 3, "head": 2}),
        ("layer_pos_head_vector_patch_setter", "post", [1, 3, 60], {"pos": 3, "neuron": 60}),
        ("layer_head_vector_patch_setter", "k", [1, -1], {"head": 1}),
        ("layer_head_pattern_patch_setter", "pattern", [1, 2], {"head": 2}),
        ("layer_head_pattern_patch_setter", "attn_scores", [1, 2], {"head": 2}),
        ("layer_head_pos_pattern_patch_setter", "pattern", [1, 2, 4], {"head": 2, "pos": 4}),
        (
            "layer_head_dest_src_pos_pattern_patch_setter",
            "pattern",
            [1, 2, 4, 3],
            {"head": 2, "pos": 4, "key_pos": 3},
        ),
    ],
)
def test_the_patch_of_a_row(engine, setter, activation, row, expected):
    model, corrupted, cache = tiny_setting("llama", d_mlp=64)
    get_act_patch.generic_activation_patch(
        model, corrupted, cache, metric, getattr(patch_setters, setter), activation,
        index_df=pandas.DataFrame([row]),
    )  # fmt: skip
    [patch] = engine.patches
    fields = ("pos", "head", "neuron", "key_pos")
    assert {f: getattr(patch, f) for f in fields} == dict.fromkeys(fields) | expected
    assert SITES[patch.site].hook_name(patch.layer).startswith("blocks.1.")
    assert patch.mode == "replace"


def test_one_call_and_one_source(engine):
    model, corrupted, cache = tiny_setting("gpt2")
    get_act_patch.get_act_patch_resid_pre(model, corrupted, cache, metric)
    [(tokens, runs, progress)] = engine.calls
    assert torch.equal(tokens, corrupted)
    assert progress is True
    assert [(p.layer, p.pos) for p in engine.patches] == [
        (layer, pos) for layer in range(2) for pos in range(POS)
    ]
    sources = {id(patch.source): patch.source for patch in engine.patches}
    [source] = sources.values()
    # The rest of the cache too: it says how the clean prompts were run.
    assert set(source) == set(cache.keys())
    for name, activation in source.items():
        assert activation.data_ptr() == cache[name].data_ptr()


@pytest.mark.parametrize(("function", "types"), [(EVERY[0], 5), (EVERY[1], 5), (EVERY[2], 3)])
def test_every_is_one_sweep(engine, function, types):
    model, corrupted, cache = tiny_setting("llama")
    result = getattr(get_act_patch, function)(model, corrupted, cache, metric=metric)
    assert len(engine.calls) == 1
    assert result.shape[:2] == (types, 2)
    if types == 5:
        # Two KV heads of four: the rest is padding.
        assert not result[2:4, ..., 2:].any()
        assert result[2:4, ..., :2].all() and result[:2].all()


def test_one_clean_prompt_for_a_batch(either):
    model, corrupted, _ = tiny_setting("llama")
    clean = prompts(1, POS, seed=1)
    _, one = model.run_with_cache(clean)
    _, repeated = model.run_with_cache(clean.expand(BATCH, -1))
    for name in ("get_act_patch_attn_head_v_all_pos", "get_act_patch_mlp_out"):
        function = getattr(get_act_patch, name)
        got = function(model, corrupted, one, metric)
        assert_close_to(got, function(model, corrupted, repeated, metric))


def test_a_prompt_without_a_batch_axis(either):
    model, corrupted, _ = tiny_setting("gpt2")
    _, cache = model.run_with_cache(prompts(1, POS, seed=1))
    got = get_act_patch.get_act_patch_attn_out(model, corrupted[0], cache, metric)
    want = get_act_patch.get_act_patch_attn_out(model, corrupted[:1], cache, metric)
    assert_close_to(got, want)
    assert got.shape == (2, POS)


def test_nothing_to_do(no_engine):
    model, corrupted, cache = tiny_setting("gpt2")
    frame = pandas.DataFrame({"layer": [], "pos": []}, dtype=int)
    for setter in (patch_setters.layer_pos_patch_setter, lambda x, index, clean: x):
        result = get_act_patch.generic_activation_patch(
            model, corrupted, cache, metric, setter, "resid_pre", index_df=frame
        )
        assert result.shape == (0,)


# -- the plain way -------------------------------------------------------------------------------


def returns_new(corrupted, index, clean):
    layer, pos = index
    patched = corrupted.clone()
    patched[:, pos] = (corrupted[:, pos] + (1 + layer) * clean[:, pos]) / 2
    return patched


def in_place(corrupted, index, clean):
    layer, pos = index
    corrupted[:, pos] = (corrupted[:, pos] + (1 + layer) * clean[:, pos]) / 2
    return corrupted


def in_place_without_return(corrupted, index, clean):
    in_place(corrupted, index, clean)


CUSTOM = {
    "returns new": returns_new,
    "in place": in_place,
    "lambda": lambda corrupted, index, clean: returns_new(corrupted, index, clean),
    "wrapped": functools.wraps(patch_setters.layer_pos_patch_setter)(returns_new),
    "nothing returned": in_place_without_return,
}


@pytest.mark.tl
@pytest.mark.parametrize("kind", CUSTOM)
@pytest.mark.parametrize("grad", [True, False])
def test_custom_setters(no_engine, kind, grad):
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("gpt2")
    arguments = (metric, CUSTOM[kind], "attn_out", ("layer", "pos"))
    with torch.no_grad():
        want = their_patching.generic_activation_patch(a, corrupted, their_cache, *arguments)
    with torch.set_grad_enabled(grad):
        got = get_act_patch.generic_activation_patch(b, corrupted, cache, *arguments)
    assert not got.requires_grad
    assert_close_to(got, want, atol=1e-5)


@pytest.mark.tl
@pytest.mark.parametrize("activation", ["normalized1ln1", "pattern", "mlp_post", "scale0ln2"])
def test_custom_indices(no_engine, activation):
    """A frame whose columns only the setter understands, on any hook point."""
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("gpt2")

    def setter(corrupted, index, clean):
        _, first, factor = index
        corrupted[:, int(first) :] = corrupted[:, int(first) :] + factor * clean[:, int(first) :]
        return corrupted

    frame = pandas.DataFrame({"layer": ["0", "1"], "from": [1, 3], "factor": [0.25, -1.5]})
    arguments = (metric, setter, activation)
    with torch.no_grad():
        want = their_patching.generic_activation_patch(
            a, corrupted, their_cache, *arguments, index_df=frame
        )
    got = get_act_patch.generic_activation_patch(b, corrupted, cache, *arguments, index_df=frame)
    assert_close_to(got, want, atol=1e-5)
    assert abs(float(want[0] - want[1])) > 1e-4


@pytest.mark.tl
def test_several_positions_in_one_row(no_engine):
    their_patching = pytest.importorskip("transformer_lens.patching")
    a, b, corrupted, their_cache, cache = setting("gpt2")
    frame = pandas.DataFrame({"layer": [0, 1], "pos": [[1, 2], [0, 4]]})
    changed = {"index_axis_names": None, "index_df": frame}
    with torch.no_grad():
        want = their_patching.get_act_patch_resid_pre(a, corrupted, their_cache, metric, **changed)
    got = get_act_patch.get_act_patch_resid_pre(b, corrupted, cache, metric, **changed)
    assert_close_to(got, want, atol=1e-5)


def test_what_a_setter_gets(no_engine):
    model, corrupted, cache = tiny_setting("gpt2")
    seen = []

    def setter(activation, index, clean):
        seen.append((type(index), index, clean))
        index.clear()
        return activation

    values = get_act_patch.generic_activation_patch(
        model, corrupted, cache, metric, setter, "z", ("layer", "head")
    )
    assert [index for kind, index, _ in seen] == [[]] * 8
    assert all(kind is list for kind, _, _ in seen)
    assert [clean is cache["z", layer] for _, _, clean in seen for layer in (0, 1)].count(True) == 8
    # A setter that changes nothing leaves the corrupted run.
    assert_close_to(values, metric(model(corrupted)).detach().expand(2, 4))


def test_nothing_the_caller_holds_is_changed(either):
    model, corrupted, cache = tiny_setting("llama")
    held = []
    model.add_hook("blocks.0.attn.hook_z", lambda x, hook: held.append((x, x.clone())))
    before = {key: value.clone() for key, value in cache.items()}
    tokens = corrupted.clone()
    try:
        for setter in (patch_setters.layer_head_vector_patch_setter, lambda x, i, c: x.zero_()):
            get_act_patch.generic_activation_patch(
                model, corrupted, cache, metric, setter, "z", ("layer", "head")
            )
    finally:
        model.reset_hooks()
    assert held and all(torch.equal(x, copy) for x, copy in held)
    assert torch.equal(tokens, corrupted)
    assert all(torch.equal(before[key], cache[key]) for key in before)


def test_a_bar_is_shown(no_engine, capsys):
    model, corrupted, cache = tiny_setting("gpt2")
    get_act_patch.generic_activation_patch(
        model, corrupted, cache, metric, lambda x, index, clean: clean, "z", ("layer",)
    )
    assert "2/2" in capsys.readouterr().err


def test_hooks_come_off_when_a_setter_raises():
    model, corrupted, cache = tiny_setting("gpt2")

    def setter(activation, index, clean):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        get_act_patch.generic_activation_patch(
            model, corrupted, cache, metric, setter, "z", ("layer", "head")
        )
    assert not model.list_hooks()


# -- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "as_scalar",
    [lambda x: x, lambda x: x[None], lambda x: x[None, None], float, lambda x: x.numpy()[()]],
    ids=["0-d", "[1]", "[1, 1]", "float", "numpy"],
)
def test_forms_of_a_scalar(either, as_scalar):
    model, corrupted, cache = tiny_setting("gpt2")
    expected = get_act_patch.get_act_patch_attn_out(model, corrupted, cache, metric)
    with torch.no_grad():
        got = get_act_patch.get_act_patch_attn_out(
            model, corrupted, cache, lambda logits: as_scalar(metric(logits).detach())
        )
    assert_close_to(got, expected)


@pytest.mark.parametrize(
    "setter", [patch_setters.layer_pos_patch_setter, lambda x, index, clean: x]
)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda logits: logits[:, -1, 0], r"returned shape \[2\].*\.mean\(\)"),
        (lambda logits: logits[:, -1], r"returned shape \[2, 50\]"),
        (lambda logits: None, "returned NoneType"),
        (lambda logits: "much", "returned str"),
    ],
)
def test_a_metric_that_is_no_scalar(either, setter, bad, message):
    model, corrupted, cache = tiny_setting("gpt2")
    with pytest.raises(MetricError, match=message):
        get_act_patch.generic_activation_patch(
            model, corrupted, cache, bad, setter, "resid_pre", ("layer", "pos")
        )


def test_metrics_of_this_library(either):
    model, corrupted, _ = tiny_setting("gpt2")
    _, cache = model.run_with_cache(prompts(1, POS, seed=1))
    arguments = (model, corrupted[:1], cache)
    got = get_act_patch.get_act_patch_mlp_out(*arguments, metrics.logit_diff(3, 7))
    want = get_act_patch.get_act_patch_mlp_out(*arguments, lambda x: x[0, -1, 3] - x[0, -1, 7])
    assert_close_to(got, want)
    with pytest.raises(SweepError, match="normalize=True needs the logits of both runs"):
        get_act_patch.get_act_patch_mlp_out(*arguments, metrics.answer_logit(3, normalize=True))


# -- errors --------------------------------------------------------------------------------------


def test_an_activation_that_is_not_cached(no_engine):
    model, corrupted, cache = tiny_setting("gpt2")
    name = "blocks.1.hook_resid_pre"
    some = {key: value for key, value in cache.items() if key != name}
    for given in (some, type(cache)(some, model)):
        for setter in (patch_setters.layer_pos_patch_setter, lambda x, index, clean: x):
            with pytest.raises(KeyError, match=f"'{name}'.*does not hold it.*run_with_cache"):
                get_act_patch.generic_activation_patch(
                    model, corrupted, given, metric, setter, "resid_pre", ("layer", "pos")
                )


@pytest.mark.parametrize("length", [POS - 1, POS + 1])
@pytest.mark.parametrize(
    "function", ["get_act_patch_resid_pre", "get_act_patch_attn_head_pattern_all_pos"]
)
def test_prompts_of_another_length(no_engine, function, length):
    model, _, cache = tiny_setting("gpt2")
    with pytest.raises(RuntimeError, match=f"has {POS} positions.*have {length}") as caught:
        getattr(get_act_patch, function)(model, prompts(BATCH, length), cache, metric)
    assert isinstance(caught.value, ShapeError)


def test_another_number_of_prompts(no_engine):
    model, _, cache = tiny_setting("gpt2")
    with pytest.raises(ShapeError, match="is of 2 prompts and corrupted_tokens are 3"):
        get_act_patch.get_act_patch_mlp_out(model, prompts(3, POS), cache, metric)


def test_a_cache_without_batch_axis(no_engine):
    model, corrupted, _ = tiny_setting("gpt2")
    _, cache = model.run_with_cache(prompts(1, POS), remove_batch_dim=True)
    with pytest.raises(ShapeError, match=r"shape \[5, 4, 8\].*batch, pos, head, width"):
        get_act_patch.get_act_patch_attn_head_out_by_pos(model, corrupted[:1], cache, metric)


def test_lengths_are_a_custom_setters_business():
    model, corrupted, cache = tiny_setting("gpt2")
    values = get_act_patch.generic_activation_patch(
        model, corrupted[:, :3], cache, metric,
        lambda x, index, clean: clean[:, index[1] : index[1] + 3], "resid_pre",
        index_df=pandas.DataFrame({"layer": [0, 0], "start": [0, 2]}),
    )  # fmt: skip
    assert values.shape == (2,) and float(values[0]) != float(values[1])


@pytest.mark.parametrize(
    ("activation", "setter", "row", "message"),
    [
        ("resid_pre", "layer_pos_patch_setter", [0, 5], "has 5 entries along pos, and 5"),
        ("resid_pre", "layer_pos_patch_setter", [0, -6], "has 5 entries along pos, and -6"),
        ("k", "layer_head_vector_patch_setter", [1, 2], "has 2 entries along head, and 2"),
        ("pattern", "layer_head_pattern_patch_setter", [1, 4], "has 4 entries along head"),
        (
            "pattern",
            "layer_head_dest_src_pos_pattern_patch_setter",
            [1, 0, 0, 9],
            "has 5 entries along key_pos",
        ),
        ("resid_pre", "layer_pos_patch_setter", [2, 0], "layer 2 of resid_pre is out of range"),
    ],
)
def test_an_index_out_of_range(no_engine, activation, setter, row, message):
    model, corrupted, cache = tiny_setting("llama")
    frame = pandas.DataFrame([[0] * len(row), row])
    with pytest.raises(PatchIndexError, match=message) as caught:
        get_act_patch.generic_activation_patch(
            model, corrupted, cache, metric, getattr(patch_setters, setter), activation,
            index_df=frame,
        )  # fmt: skip
    assert isinstance(caught.value, IndexError)


def test_a_setter_for_other_axes(no_engine):
    model, corrupted, cache = tiny_setting("gpt2")
    setter = patch_setters.layer_pos_patch_setter
    with pytest.raises(AssertionError, match="3 entries, and layer_pos_patch_setter takes 2"):
        get_act_patch.generic_activation_patch(
            model, corrupted, cache, metric, setter, "z", ("layer", "pos", "head")
        )


@pytest.mark.parametrize(
    ("activation", "axes", "message"),
    [
        ("resid_per", ("layer", "pos"), "no activation 'resid_per'.*Nearest: 'resid_pre'"),
        ("resid_pre", ("layer", "position"), "'position'.*Nearest: 'pos'"),
        ("resid_pre", None, "give one of index_axis_names and index_df; there are neither"),
    ],
)
def test_what_does_not_exist(no_engine, activation, axes, message):
    model, corrupted, cache = tiny_setting("gpt2")
    setter = patch_setters.layer_pos_patch_setter
    with pytest.raises(KeyError, match=message):
        get_act_patch.generic_activation_patch(
            model, corrupted, cache, metric, setter, activation, axes
        )


def test_without_pandas(either, monkeypatch):
    model, corrupted, cache = tiny_setting("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setitem(sys.modules, "pandas", None)
        values = get_act_patch.get_act_patch_attn_out(model, corrupted, cache, metric)
    assert values.shape == (2, POS)
    with pytest.raises(ImportError, match="pip install pandas"):
        get_act_patch.get_act_patch_attn_out(model, corrupted, cache, metric, return_index_df=True)


def test_positions_before_the_first_difference_are_skipped(monkeypatch):
    """Equal bits are found only if the prompts are run as the cache was made: whole, here."""
    model, clean = ours("gpt2"), prompts(1, 6)
    corrupted = clean.clone()
    corrupted[:, 4] = (corrupted[:, 4] + 5) % 50
    _, cache = model.run_with_cache(clean)
    plans = []
    execute = ENGINE.execute

    def watched(query, **options):
        plans.append(query.plan)
        return execute(query, **options)

    monkeypatch.setattr(ENGINE, "execute", watched)
    get_act_patch.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, -1, 3])
    assert len(plans[0].order) == 2 * model.cfg.n_layers - 1
