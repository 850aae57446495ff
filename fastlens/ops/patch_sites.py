"""Patching many sites of one activation at once, by a table: as a copy, or in place."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.errors import GradientError, ShapeError, did_you_mean
from fastlens.kernels.sites import check_table
from fastlens.ops.dispatch import is_opaque, kernel_for

MODES = ("replace", "add", "scale", "zero", "mean")


def patch_sites(
    activation: Float[Tensor, "*axes"],
    table: Int[Tensor, "site width"],
    values: Float[Tensor, "*values"] | None = None,
    mode: str = "replace",
) -> Float[Tensor, "*axes"]:
    """A copy of an activation in which the sites of a table are changed, all in one launch.

    A site is one row of the table: its index along each of the first ``width`` axes of the
    activation, such as (row, pos) or (row, pos, head). It holds the block of the axes that are
    left: a table of width 2 on ``[row, pos, head, d_head]`` patches all heads at a position, one of
    width 4 single channels. With ``x`` for what the site holds and ``v`` for its value, it becomes

    * ``"replace"``: ``v``;
    * ``"add"``: ``x + v``;
    * ``"scale"``: ``x * v``;
    * ``"zero"``: 0;
    * ``"mean"``: the mean of ``values`` over their first axis, at the site's place along the other
      axes (mean ablation; the site's index along the first axis only says where it goes).

    Args:
        activation: Never written to: a hook or a cache may hold it.
        table: On the CPU by preference. One on a GPU is checked by copying it back, which waits for
            the GPU.
        values: ``v``, broadcast against ``[site, *block]``: one vector a site, one for all sites,
            or one number a site as ``[site, 1]``. For ``"mean"`` ``[sample, *axes[1:]]``: an
            activation of the same shape but for the number of rows, such as the clean one. None
            for ``"zero"``. Cast to the dtype of the activation.
        mode: One of the above.

    Returns: A new contiguous tensor.

    Numerics: exact but for one rounding to the dtype of the activation ("add", "scale"); a mean is
    summed in float32 (float64 for float64). Differentiable in activation and values.
    Cost: reads and writes the activation once, then the sites only. On CUDA the kernel in csrc/ is
    taken if it was built; it was not run on a GPU.
    Raises: SiteError for an index below 0 or past the end, and for a site named twice, before
        anything is launched; ShapeError for a table or values that do not fit.
    """
    _check(activation, table, values, mode)
    return torch.ops.fastlens.patch_sites(activation, table, values, mode)


def patch_sites_(
    activation: Float[Tensor, "*axes"],
    table: Int[Tensor, "site width"],
    values: Float[Tensor, "*values"] | None = None,
    mode: str = "replace",
    is_checked: bool = False,
) -> None:
    """As `patch_sites`, written into the activation itself: nothing but the sites is touched.

    For activations that nobody else holds: a hook's or a cache's tensor would change in the
    holder's hands.

    Args:
        activation: Any strides, but no two of its places may share memory (an expanded tensor).
        table, values, mode: As for `patch_sites`. Values may be a part of the activation's own
            memory only if no site lies in it.
        is_checked: The table and the values are known to fit and no site comes twice, so nothing
            is checked and a table on a GPU is not copied back. With a table for which this is not
            true, what is written is undefined, and on a GPU where.

    Numerics: as `patch_sites`. No gradient.
    Cost: reads and writes the sites only. On CUDA kernels are taken if they can be built or
    compiled; they were not run on a GPU.
    Raises: As `patch_sites`; GradientError where a gradient would have to pass through.
    """
    if not is_checked:
        _check(activation, table, values, mode)
        if any(
            n > 1 and step == 0
            for n, step in zip(activation.shape, activation.stride(), strict=True)
        ):
            raise ShapeError(
                f"places of the activation {list(activation.shape)} share memory (strides "
                f"{list(activation.stride())}), so writing one would change others. Clone it."
            )
    elif not is_opaque("patch_sites_", activation.device.type, activation.dtype):
        _patch_sites_in_place(activation, table, values, mode, is_checked)
        return
    torch.ops.fastlens.patch_sites_(activation, table, values, mode, is_checked)


def _check(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> None:
    if mode not in MODES:
        raise ShapeError(f"no mode {mode!r}: {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    check_table(table, activation.ndim)
    width = table.shape[1]
    if width == 0:
        raise ShapeError("the table has no index a site. Give at least the row.")
    if (values is None) != (mode == "zero"):
        found = "none were given" if values is None else f"got {list(values.shape)}"
        raise ShapeError(f"mode 'zero' takes no values and every other mode does; {mode}: {found}.")
    if values is None:
        return
    if values.device != activation.device:
        raise ShapeError(
            f"values are on {values.device} and the activation on {activation.device}. Move them."
        )
    if mode == "mean":
        if values.shape[1:] != activation.shape[1:] or values.shape[:1] in ((), (0,)):
            raise ShapeError(
                f"for a mean, values are [sample, {', '.join(map(str, activation.shape[1:]))}] "
                f"with at least one sample; got {list(values.shape)}."
            )
        return
    wanted = (table.shape[0], *activation.shape[width:])
    try:
        fits = torch.broadcast_shapes(values.shape, wanted) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(
            f"values {list(values.shape)} do not broadcast against [site, *block] = "
            f"{list(wanted)}: {table.shape[0]} sites of an activation {list(activation.shape)}."
        )


# -- the op that compilers see ---------------------------------------------------------------------

_LIBRARY = torch.library.Library("fastlens", "FRAGMENT")
_LIBRARY.define("patch_sites(Tensor activation, Tensor table, Tensor? values, str mode) -> Tensor")
# Not "mode": torch passes an op that writes its arguments by name, beside a "mode" of its own.
_LIBRARY.define(
    "patch_sites_(Tensor(a!) activation, Tensor table, Tensor? values, str how, "
    "bool is_checked=False) -> ()"
)


def _patch_sites(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> Tensor:
    kernel = kernel_for("patch_sites", activation.device.type, activation.dtype)
    return kernel(activation, table, values, mode)


def _patch_sites_in_place(
    activation: Tensor, table: Tensor, values: Tensor | None, how: str, is_checked: bool = False
) -> None:
    if activation.requires_grad or (
        values is not None and values.requires_grad and torch.is_grad_enabled()
    ):
        raise GradientError(
            "patch_sites_ writes in place and passes no gradient on, and the activation or the "
            "values require one. Use patch_sites, or give it activation.detach()."
        )
    kernel = kernel_for("patch_sites_", activation.device.type, activation.dtype)
    kernel(activation, table, values, how, is_checked)


def _fake_in_place(
    activation: Tensor, table: Tensor, values: Tensor | None, how: str, is_checked: bool = False
) -> None:
    return None


def _fake(activation: Tensor, table: Tensor, values: Tensor | None, mode: str) -> Tensor:
    return torch.empty_like(activation, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    activation, table, values, mode = inputs
    needs_both = mode == "scale"
    ctx.save_for_backward(table, values if needs_both else None, activation if needs_both else None)
    ctx.mode = mode
    ctx.values_like = None if values is None else (values.shape, values.dtype)


def _backward(ctx, grad: Tensor):
    table, values, activation = ctx.saved_tensors
    index = tuple(table.to(grad.device, torch.int64).unbind(1))
    at_sites = grad[index]
    to_activation = to_values = None
    if ctx.needs_input_grad[0]:
        to_activation = _to_activation(grad, index, at_sites, values, ctx.mode)
    if ctx.needs_input_grad[2] and ctx.values_like is not None:
        shape, dtype = ctx.values_like
        if ctx.mode == "mean":
            # Sites of several rows may share a place.
            places = grad.new_zeros(shape[1:])
            if len(index) > 1:
                places = places.index_put(index[1:], at_sites / shape[0], accumulate=True)
            else:
                places = at_sites.sum(0) / shape[0]
            to_values = places.expand(shape)
        else:
            to_values = at_sites * activation[index] if ctx.mode == "scale" else at_sites
            to_values = to_values.sum_to_size(shape)
        to_values = to_values.to(dtype)
    return to_activation, None, to_values, None


def _to_activation(
    grad: Tensor, index: tuple[Tensor, ...], at_sites: Tensor, values: Tensor | None, mode: str
) -> Tensor:
    if mode == "add":
        # Not the gradient itself: an op may not return its input.
        return grad.clone()
    if mode == "scale":
        assert values is not None
        return grad.index_put(index, at_sites * values.to(grad.dtype))
    return grad.index_put(index, torch.zeros_like(at_sites))


_LIBRARY.impl("patch_sites", _patch_sites, "CompositeExplicitAutograd")
_LIBRARY.impl("patch_sites_", _patch_sites_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("fastlens::patch_sites", _fake, lib=_LIBRARY)
torch.library.register_fake("fastlens::patch_sites_", _fake_in_place, lib=_LIBRARY)
torch.library.register_autograd(
    "fastlens::patch_sites", _backward, setup_context=_setup_context, lib=_LIBRARY
)
