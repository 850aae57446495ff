"""Attention of packed rows by a table, shared prefixes read once, in Triton. Not run on a GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels import torch_suffix_attention
from fastlens.kernels.jit import launch, power_of_two, refusal
from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule
from fastlens.kernels.spans import Span
from fastlens.kernels.suffix_tiles import longest_piece, tiles_of
from fastlens.kernels.triton_attention import LARGEST_D_HEAD, slopes

# (bytes of an element, BLOCK_D) -> BLOCK_M, BLOCK_N, num_warps, num_stages. None spills registers
# on sm_80, sm_90, sm_100 or gfx942, by triton 3.7.1 or by 3.9.0, with every switch or only causal
# (tests/gpu/test_ahead_of_time.py); none was timed.
BLOCKS = {
    (2, 16): (64, 32, 4, 2),
    (2, 32): (64, 32, 4, 2),
    (2, 64): (64, 32, 4, 2),
    (2, 128): (64, 16, 4, 2),
    (2, 256): (64, 16, 8, 2),
    (4, 16): (32, 32, 4, 2),
    (4, 32): (32, 32, 4, 2),
    (4, 64): (64, 16, 8, 3),
    (4, 128): (16, 16, 8, 2),
    (4, 256): (16, 16, 4, 2),
}
# The same for own keys where no branch wants more than FEWEST_ROWS rows. Tiles are padded to them:
# matrix instructions take no fewer.
FEWEST_ROWS = 16
BLOCKS_OF_FEW = {
    (2, 16): (FEWEST_ROWS, 32, 4, 2),
    (2, 32): (FEWEST_ROWS, 64, 4, 2),
    (2, 64): (FEWEST_ROWS, 32, 4, 2),
    (2, 128): (FEWEST_ROWS, 32, 4, 2),
    (2, 256): (FEWEST_ROWS, 32, 2, 2),
    (4, 16): (FEWEST_ROWS, 32, 4, 2),
    (4, 32): (FEWEST_ROWS, 32, 4, 2),
    (4, 64): (FEWEST_ROWS, 32, 8, 2),
    (4, 128): (FEWEST_ROWS, 16, 4, 2),
    (4, 256): (FEWEST_ROWS, 16, 4, 2),
}


def suffix_attention(
    q: Float[Tensor, "row head d_head"],
    k: Float[Tensor, "row kv_head d_head"],
    v: Float[Tensor, "row kv_head d_head"],
    table: Int[Tensor, "branch pos"],
    spans: Sequence[Span],
    rule: AttentionRule,
    key_mask: Bool[Tensor, "branch pos"] | None = None,
) -> Float[Tensor, "out_row head d_head"]:
    """See `fastlens.ops.suffix_attention.suffix_attention`.

    Keys and values are read by the table where they lie; nothing is gathered. The table is copied
    to the host once, where the work is cut into tiles: that waits for the device.
    """
    n_heads, d_head = q.shape[1:]
    if d_head > LARGEST_D_HEAD:
        return torch_suffix_attention.suffix_attention(q, k, v, table, spans, rule, key_mask)
    host_table, host_mask, host_spans = _on_host(table, key_mask, spans)
    block_d = max(16, power_of_two(d_head))
    is_few = longest_piece(host_spans) <= FEWEST_ROWS
    blocks, own_blocks = (
        sizes[q.element_size(), block_d] for sizes in (BLOCKS, BLOCKS_OF_FEW if is_few else BLOCKS)
    )
    work = tiles_of(host_table, host_spans, rule, (blocks[0], own_blocks[0]), host_mask)
    n_rows = len(work[1].entries)
    out = torch.empty(n_rows, n_heads, d_head, dtype=q.dtype, device=q.device)
    has_prefix = len(work[0].tiles) > 0
    state = state_lse = None
    if has_prefix:
        state = torch.empty(out.shape, dtype=torch.float32, device=q.device)
        # A row that no tile of the first launch holds has no state.
        state_lse = torch.full(out.shape[:2], -torch.inf, device=q.device)
    arrays = [array for tiles in work for array in tiles]
    tiles, entries, own_tiles, own_entries = _on_device(arrays, q.device)
    for is_first, some, of_them, (block_m, block_n, num_warps, num_stages) in (
        (True, tiles, entries, blocks),
        (False, own_tiles, own_entries, own_blocks),
    ):
        if not len(some):
            continue
        launch(
            *("suffix_attention", "suffix_attention_kernel", (len(some) * n_heads,), q.device),
            *(q, k, v, None if is_first else out, state, state_lse, table, some, of_them),
            None if key_mask is None else key_mask.view(torch.uint8),
            slopes(n_heads, q.device) if rule.alibi else None,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *table.stride(),
            *((0, 0) if key_mask is None else key_mask.stride()),
            *(n_heads, n_heads // k.shape[1], rule.window or 0),
            *(1.0 / rule.scale, float(rule.soft_cap)),
            CAUSAL=rule.causal,
            WINDOW=rule.window is not None,
            SOFT_CAP=rule.soft_cap > 0,
            ALIBI=rule.alibi,
            KEY_MASK=key_mask is not None,
            LEAVES_STATE=is_first,
            HAS_STATE=has_prefix and not is_first,
            D_HEAD=d_head,
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


HostSpan = tuple[np.ndarray, int, int]


def _on_host(
    table: Tensor, key_mask: Tensor | None, spans: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray | None, list[HostSpan]]:
    """Table, mask and spans as arrays, by one copy."""
    parts = [table, *(() if key_mask is None else (key_mask,)), *(span.branches for span in spans)]
    flat = [part.to(table.device, torch.int64).reshape(-1) for part in parts]
    everything = torch.cat(flat).cpu().numpy()
    arrays = np.split(everything, np.cumsum([part.numel() for part in parts])[:-1])
    host_table = arrays.pop(0).reshape(table.shape)
    host_mask = None if key_mask is None else arrays.pop(0).reshape(table.shape)
    branches = zip(arrays, spans, strict=True)
    return host_table, host_mask, [(some, span.start, span.stop) for some, span in branches]


def _on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """As int32, by one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int32))
    parts = flat.to(device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


KERNEL = Kernel(
    "suffix_attention",
    "triton suffix_attention",
    suffix_attention,
    refusal,
    priority=20,
    is_opaque=True,
)
