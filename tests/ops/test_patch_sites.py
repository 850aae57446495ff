"""Patching by a table, as a copy and in place: each mode site by site, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlens.errors import GradientError, ShapeError, SiteError
from fastlens.kernels import reference
from fastlens.ops import dispatch
from fastlens.ops.patch_sites import MODES, _check, patch_sites, patch_sites_
from tests.close import assert_close_to

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPE = (3, 5, 2, 4)


def some_sites(lengths, n, generator=None):
    """Distinct sites in no order."""
    flat = torch.randperm(int(torch.tensor(lengths).prod()), generator=generator)[:n]
    return torch.stack(torch.unravel_index(flat, lengths), 1)


def values_for(mode, n_sites, shape, width, dtype=torch.float32):
    if mode == "zero":
        return None
    if mode == "mean":
        return torch.randn(7, *shape[1:], dtype=dtype)
    return torch.randn(n_sites, *shape[width:], dtype=dtype)


def by_hand(x, table, values, mode):
    """The definition, one site after another, in float64."""
    out = x.double().clone()
    for number, site in enumerate(map(tuple, table.tolist())):
        if mode == "zero":
            out[site] = 0.0
        elif mode == "mean":
            out[site] = values.double()[(slice(None), *site[1:])].mean(0)
        else:
            v = values.to(x.dtype).double()[number]
            here = x.double()[site]
            out[site] = {"replace": v, "add": here + v, "scale": here * v}[mode]
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_each_mode_is_its_definition(mode, width):
    x = torch.randn(*SHAPE, dtype=torch.float64)
    table = some_sites(SHAPE[:width], 3)
    values = values_for(mode, 3, SHAPE, width, torch.float64)
    before = x.clone()
    out = patch_sites(x, table, values, mode)
    assert_close_to(out, by_hand(x, table, values, mode), atol=1e-14)
    assert torch.equal(x, before) and out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_in_each_dtype(mode, dtype):
    x = torch.randn(*SHAPE).to(dtype)
    table = some_sites(SHAPE[:3], 8).to(torch.int32)
    values = values_for(mode, 8, SHAPE, 3)
    values = None if values is None else values.to(dtype)
    truth = by_hand(x, table, values, mode)
    out = patch_sites(x, table, values, mode)
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    if mode in ("add", "scale", "mean"):
        # float32's mean is a sum of seven.
        assert_close_to(out, truth, atol=4 * step if dtype == torch.float32 else step, rtol=step)
    else:
        assert torch.equal(out.double(), truth)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_shape_width_and_table(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    width = data.draw(st.integers(1, len(shape)))
    places = int(torch.tensor(shape[:width]).prod())
    n_sites = data.draw(st.integers(0, places))
    mode = data.draw(st.sampled_from(MODES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    table = some_sites(shape[:width], n_sites, generator)
    values = values_for(mode, n_sites, shape, width, torch.float64)
    assert_close_to(
        patch_sites(x, table, values, mode), by_hand(x, table, values, mode), atol=1e-14
    )


def test_values_are_broadcast():
    x, table = torch.randn(*SHAPE), some_sites(SHAPE[:3], 5)
    for values in (torch.randn(4), torch.randn(5, 1), torch.tensor(2.0), torch.randn(1, 4)):
        whole = values.expand(5, 4)
        assert torch.equal(patch_sites(x, table, values), patch_sites(x, table, whole))


def test_a_strided_activation_gives_a_contiguous_result():
    big = torch.randn(5, 3, 2, 9)
    x = big.transpose(0, 1)[..., 2:6]
    table = torch.tensor([[1, 4, 0], [2, 0, 1]])
    out = patch_sites(x, table, torch.ones(2, 4), "add")
    assert out.is_contiguous() and not x.is_contiguous()
    assert torch.equal(out, by_hand(x, table, torch.ones(2, 4), "add").float())


def test_the_mean_of_the_activation_itself():
    x = torch.randn(4, 3, 2)
    out = patch_sites(x, torch.tensor([[0, 2], [3, 2]]), x, "mean")
    assert_close_to(out[[0, 3], 2], x[:, 2].mean(0).expand(2, 2), atol=1e-6)
    assert torch.equal(out[:, :2], x[:, :2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 3])
def test_gradients(mode, width):
    shape = (3, 2, 2, 2)
    table = some_sites(shape[:width], 2)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    values = values_for(mode, 2, shape, width, torch.float64)
    if values is None:
        assert torch.autograd.gradcheck(lambda x: patch_sites(x, table, None, mode), (x,))
        return
    values.requires_grad_()

    def run(x, values):
        return patch_sites(x, table, values, mode)

    assert torch.autograd.gradcheck(run, (x, values))
    assert torch.autograd.gradgradcheck(run, (x, values), fast_mode=True)


def test_gradients_of_broadcast_and_cast_values():
    x = torch.randn(*SHAPE, requires_grad=True)
    table = some_sites(SHAPE[:3], 4)
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    patch_sites(x, table, number, "scale").sum().backward()
    assert number.grad is not None and number.grad.dtype == torch.float64
    assert_close_to(number.grad, x[tuple(table.T)].sum(), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(mode, needs_grad):
    x = torch.randn(*SHAPE, requires_grad=needs_grad)
    table = some_sites(SHAPE[:2], 3)
    values = values_for(mode, 3, SHAPE, 2)
    if values is not None:
        values.requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.fastlens.patch_sites.default, (x, table, values, mode))


def test_a_fake_gpu_needs_no_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda")
        out = patch_sites(x, torch.zeros(1, 2, dtype=torch.long), None, "zero")
    assert (out.device.type, out.shape) == ("cuda", (2, 3, 4))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [[0, 5], [3, 0], [-1, 0], [0, -1], [2**40, 0]])
def test_a_site_outside_is_named(site):
    table = torch.tensor([[0, 0], site])
    with pytest.raises(SiteError, match=r"site 1 of the table .* \[3, 5\] places .*1 of 2 sites"):
        patch_sites(torch.randn(3, 5, 2), table, torch.zeros(2))


def test_a_site_named_twice_is_refused_in_every_mode():
    table = torch.tensor([[2, 1], [0, 0], [2, 1]])
    x = torch.randn(3, 5, 2)
    for mode in MODES:
        with pytest.raises(SiteError, match=r"sites 0 and 2 of the table are both \[2, 1\]"):
            patch_sites(x, table, values_for(mode, 3, (3, 5, 2), 2), mode)


@pytest.mark.parametrize(
    ("table", "values", "mode", "sentence"),
    [
        (torch.zeros(1, 2), torch.zeros(2), "replace", "integers"),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2), "replace", "integers"),
        (torch.zeros(1, 4, dtype=torch.long), torch.zeros(2), "replace", "at most 3"),
        (torch.zeros(1, 0, dtype=torch.long), torch.zeros(2), "replace", "at least the row"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(3), "replace", "do not broadcast"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(2, 2), "replace", "do not broadcast"),
        (torch.zeros(1, 2, dtype=torch.long), None, "add", "none were given"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(2), "zero", "takes no values"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(2), "mean", "at least one sample"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(0, 5, 2), "mean", "at least one sample"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(2), "repalce", "'replace'"),
    ],
)
def test_what_does_not_fit_is_refused(table, values, mode, sentence):
    # Called through, the checks of shapes that run only under pytest might speak first.
    with pytest.raises(ShapeError, match=sentence):
        _check(torch.randn(3, 5, 2), table, values, mode)


def test_values_on_another_device_are_refused():
    with pytest.raises(ShapeError, match="values are on meta"):
        table = torch.zeros(1, 2, dtype=torch.long)
        patch_sites(torch.randn(3, 5, 2), table, torch.zeros(2, device="meta"))


def test_traced_whole():
    """The checks of shapes under pytest cannot be traced, so the op itself is."""
    x, table = torch.randn(3, 5, 2), torch.tensor([[0, 1], [2, 4]])

    def run(x, table):
        return torch.ops.fastlens.patch_sites(x, table, torch.ones(2), "add") * 2

    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x, table), run(x, table))
    with pytest.raises(SiteError):
        traced(x, table + 2)


# -- in place --------------------------------------------------------------------------------------

each_mode = pytest.mark.parametrize("mode", MODES)
trusted = pytest.mark.parametrize("is_checked", [False, True])


@each_mode
@trusted
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_copy_to_the_bit(mode, width, is_checked, dtype):
    x = torch.randn(*SHAPE).to(dtype)
    table = some_sites(SHAPE[:width], 3)
    values = values_for(mode, 3, SHAPE, width)
    expected = patch_sites(x, table, values, mode)
    pointer = x.data_ptr()
    assert patch_sites_(x, table, values, mode, is_checked) is None
    assert x.data_ptr() == pointer
    if mode == "mean":
        # The samples may be summed in another order.
        assert_close_to(x, expected, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(x, expected)
    y = patch_sites(torch.zeros_like(x), table, values, mode)
    reference.patch_sites_(z := torch.zeros_like(x), table, values, mode, is_checked)
    assert torch.equal(y, z)


@each_mode
@trusted
def test_in_place_writes_into_any_strides_and_nowhere_else(mode, is_checked):
    big = torch.randn(5, 3, 2, 9)
    before = big.clone()
    x = big.transpose(0, 1)[..., 2:6]
    table = torch.tensor([[1, 4, 0], [2, 0, 1]], dtype=torch.int32)
    values = values_for(mode, 2, x.shape, 3)
    expected = patch_sites(x, table, values, mode)
    patch_sites_(x, table, values, mode, is_checked)
    assert torch.equal(x, expected)
    inside = torch.zeros_like(big, dtype=torch.bool)
    inside.transpose(0, 1)[..., 2:6][tuple(table.long().T)] = True
    assert torch.equal(big[~inside], before[~inside])


@trusted
def test_in_place_values_are_broadcast_and_there_may_be_no_site(is_checked):
    table = some_sites(SHAPE[:3], 5)
    for values in (torch.randn(4), torch.randn(5, 1), torch.tensor(2.0), torch.randn(1, 4)):
        x = torch.randn(*SHAPE)
        expected = patch_sites(x, table, values, "scale")
        patch_sites_(x, table, values, "scale", is_checked)
        assert torch.equal(x, expected)
    before = x.clone()
    patch_sites_(x, table[:0], values[0], "add", is_checked)
    assert torch.equal(x, before)


@each_mode
def test_opcheck_in_place(mode):
    table = some_sites(SHAPE[:2], 3)
    for is_checked in (False, True):
        arguments = torch.randn(*SHAPE), table, values_for(mode, 3, SHAPE, 2), mode, is_checked
        torch.library.opcheck(torch.ops.fastlens.patch_sites_.default, arguments)


@trusted
def test_in_place_passes_no_gradient_on(is_checked):
    table = torch.tensor([[0, 1]])
    for x, values in (
        (torch.randn(*SHAPE, requires_grad=True), torch.zeros(2, 4)),
        (torch.randn(*SHAPE), torch.zeros(2, 4, requires_grad=True)),
    ):
        with pytest.raises(GradientError, match="passes no gradient on"):
            patch_sites_(x, table, values, "replace", is_checked)
        with pytest.raises(GradientError, match="passes no gradient on"):
            torch.ops.fastlens.patch_sites_(x, table, values, "replace")
    with torch.no_grad():
        patch_sites_(x, table, values, "replace", is_checked)
    assert not x.requires_grad and not x[0, 1].any()


def test_in_place_refuses_what_the_copy_refuses_and_writes_nothing():
    x = torch.randn(3, 5, 2)
    before = x.clone()
    with pytest.raises(SiteError, match=r"site 1 of the table .* \[3, 5\] places"):
        patch_sites_(x, torch.tensor([[0, 0], [0, 5]]), torch.zeros(2))
    with pytest.raises(SiteError, match="sites 0 and 1 of the table are both"):
        patch_sites_(x, torch.tensor([[0, 0], [0, 0]]), None, "zero")
    with pytest.raises(ShapeError, match="takes no values"):
        patch_sites_(x, torch.tensor([[0, 0]]), torch.zeros(2), "zero")
    with pytest.raises(ShapeError, match=r"share memory \(strides \[0, 2, 1\]\).*Clone it"):
        patch_sites_(x[:1].expand(3, 5, 2), torch.tensor([[0, 0]]), torch.zeros(2))
    assert torch.equal(x, before)


def test_a_trusted_table_is_neither_sorted_nor_read():
    """No check of the sites is made, whose cost would be felt at every patch of a sweep."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name().split("::")[1].split(".")[0])
            return func(*args, **(kwargs or {}))

    x, table, values = torch.randn(*SHAPE), some_sites(SHAPE[:2], 3), torch.zeros(3, 2, 4)
    with Recorded():
        patch_sites_(x, table, values, "replace", True)
    assert called == ["unbind", "index_put_"]


def test_an_opaque_kernel_in_place_is_called_through_the_registered_op(monkeypatch):
    key = "patch_sites_", "cpu", torch.float32
    dispatch.kernel_for(*key)
    monkeypatch.setattr(dispatch, "_OPAQUE", {key})
    seen = []
    monkeypatch.setitem(dispatch._CHOSEN, key, lambda *given: seen.append(given[2:]))
    patch_sites_(torch.randn(*SHAPE), torch.tensor([[1]]), None, "zero", True)
    assert seen == [(None, "zero", True)]


def test_in_place_under_a_fake_gpu_and_traced_whole():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda")
        table = torch.zeros(1, 2, dtype=torch.long)
        assert torch.ops.fastlens.patch_sites_(x, table, None, "zero") is None

    def run(x, table):
        y = x * 2
        torch.ops.fastlens.patch_sites_(y, table, torch.ones(2), "add")
        return y + 1

    traced = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, table = torch.randn(3, 5, 2), torch.tensor([[0, 1], [2, 4]])
    assert torch.equal(traced(x, table), run(x, table))
