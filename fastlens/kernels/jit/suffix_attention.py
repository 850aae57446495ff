"""Attention of packed rows whose keys a table names, shared prefixes read once. Not run on a GPU.

One kernel, launched twice. The first launch takes rows of many branches over the keys they share
and leaves their state; the second goes on from there over each branch's own keys.
"""

import triton
import triton.language as tl

from fastlens.kernels.jit.attention import LN_2, kept_keys, masked_scores, weighed


@triton.jit
def suffix_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, state_ptr, state_lse_ptr,
    table_ptr, tiles_ptr, entries_ptr, key_mask_ptr, slopes_ptr,
    stride_q_m, stride_q_h, stride_q_d,
    stride_k_n, stride_k_h, stride_k_d,
    stride_v_n, stride_v_h, stride_v_d,
    stride_table_b, stride_table_n,
    stride_mask_b, stride_mask_n,
    n_heads, group_size, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr,
    LEAVES_STATE: tl.constexpr, HAS_STATE: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of at most BLOCK_M rows, of one head, over the tile's range of keys.

    ``tiles``: first entry, number of entries, branch whose table names the keys, first key, end.
    ``entries``: row of the output, packed row of the query, absolute position.
    ``state`` holds rows mixed so far and ``state_lse`` their log-sum-exp: the first launch
    leaves them, the second starts from them.
    """
    tile = tiles_ptr + (tl.program_id(0) // n_heads).to(tl.int64) * 5
    head = (tl.program_id(0) % n_heads).to(tl.int64)
    kv_head = head // group_size
    first_entry = tl.load(tile)
    n_entries = tl.load(tile + 1)
    branch = tl.load(tile + 2).to(tl.int64)
    low = tl.load(tile + 3)
    high = tl.load(tile + 4)

    in_tile = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    is_row = in_tile < n_entries
    is_channel = channel < D_HEAD
    inside = is_row[:, None] & is_channel[None, :]
    entry = entries_ptr + (first_entry + in_tile).to(tl.int64) * 3
    out_row = tl.load(entry, mask=is_row, other=0).to(tl.int64)
    q_row = tl.load(entry + 1, mask=is_row, other=0).to(tl.int64)
    query_pos = tl.load(entry + 2, mask=is_row, other=0)
    q = tl.load(
        q_ptr + head * stride_q_h + q_row[:, None] * stride_q_m + channel[None, :] * stride_q_d,
        mask=inside,
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)

    # Rows of what is written: the state and the output are contiguous.
    written = out_row * n_heads + head
    at = written[:, None] * D_HEAD + channel[None, :]
    if HAS_STATE:
        highest = tl.load(state_lse_ptr + written, mask=is_row, other=-float("inf"))
        has_state = highest > -float("inf")
        total = tl.where(has_state, 1.0, 0.0)
        mixed = tl.load(state_ptr + at, mask=inside & has_state[:, None], other=0.0)
    else:
        highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for first_key in range(low, high, BLOCK_N):
        key_pos = first_key + column
        is_key = key_pos < high
        packed = tl.load(
            table_ptr + branch * stride_table_b + key_pos.to(tl.int64) * stride_table_n,
            mask=is_key,
            other=0,
        ).to(tl.int64)
        k = tl.load(
            k_ptr + kv_head * stride_k_h
            + packed[None, :] * stride_k_n + channel[:, None] * stride_k_d,
            mask=is_key[None, :] & is_channel[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        kept = kept_keys(
            key_mask_ptr, branch, key_pos, is_key, stride_mask_b, stride_mask_n, KEY_MASK
        )  # fmt: skip
        scores = masked_scores(
            tl.dot(q, k, input_precision="ieee"),
            query_pos[:, None], key_pos[None, :], high, scale, soft_cap, slope, window,
            kept[None, :], 0.0, CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, False,
        )  # fmt: skip
        weights, shrink, highest, total = weighed(scores, highest, total)
        v = tl.load(
            v_ptr + kv_head * stride_v_h
            + packed[:, None] * stride_v_n + channel[None, :] * stride_v_d,
            mask=is_key[:, None] & is_channel[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")

    is_blind = total == 0.0
    divisor = tl.where(is_blind, 1.0, total)
    mixed = mixed / divisor[:, None]
    if LEAVES_STATE:
        lse = tl.where(is_blind, -float("inf"), highest + tl.math.log2(divisor) * LN_2)
        tl.store(state_lse_ptr + written, lse, mask=is_row)
        tl.store(state_ptr + at, mixed, mask=inside)
    else:
        tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=inside)
