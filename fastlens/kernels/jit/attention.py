"""Fused attention, and single rows of its pattern, in Triton. Not run on a GPU."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """To float32's precision near zero too, where ``1 - 2 / (exp(2 x) + 1)`` cancels."""
    size = tl.abs(x)
    # The short odd polynomial of Cephes' tanhf, which is meant for |x| < 0.625.
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    far = 1.0 - 2.0 / (tl.math.exp2(size * LOG2_E * 2.0) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def masked_scores(
    products, query_pos, key_pos, n_keys, scale, soft_cap, slope, window, kept, bias,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores in nats from ``q . k``; minus infinity where a key is not visible."""
    scores = products * scale
    if SOFT_CAP:
        scores = soft_cap * tanh(scores / soft_cap)
    if ALIBI:
        scores += slope * tl.minimum(key_pos - query_pos, 0).to(tl.float32)
    if BIAS:
        scores += bias
    visible = key_pos < n_keys
    if CAUSAL:
        visible = visible & (key_pos <= query_pos)
    if WINDOW:
        visible = visible & (key_pos > query_pos - window)
    if KEY_MASK:
        visible = visible & kept
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def weighed(scores, highest, total):
    """One more block of scores in the softmax statistics of its rows.

    Returns: its weights, the factor that what was summed before shrinks by, the new statistics.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen no key yet: anything finite, so that no inf - inf arises.
    safe = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    # Scores are large next to the differences that matter: those are taken before any rounding.
    weights = tl.math.exp2((scores - safe[:, None]) * LOG2_E)
    shrink = tl.math.exp2((highest - safe) * LOG2_E)
    return weights, shrink, new_highest, total * shrink + tl.sum(weights, 1)


@triton.jit
def kept_keys(
    key_mask_ptr, batch, key_pos, is_key, stride_mask_b, stride_mask_n, KEY_MASK: tl.constexpr
):
    """Which of these keys the mask keeps; without one, which there are."""
    kept = is_key
    if KEY_MASK:
        kept = tl.load(
            key_mask_ptr + batch * stride_mask_b + key_pos.to(tl.int64) * stride_mask_n,
            mask=is_key,
            other=0,
        ).to(tl.int1)
    return kept


@triton.jit
def block_scores(
    q, k_ptr, key_mask_ptr, bias_ptr, slope,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    batch, head, kv_head, first_row, first_key,
    n_queries, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores in nats of the query rows ``q`` on BLOCK_N keys from ``first_key`` on.

    ``batch``, ``head`` and ``kv_head`` are int64.
    """
    in_block = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    row = first_row + in_block
    key_pos = first_key + column
    is_key = key_pos < n_keys
    # Positions times strides may pass 2^31; what is left inside a block does not.
    k_block = k_ptr + batch * stride_k_b + kv_head * stride_k_h
    k_block += tl.cast(first_key, tl.int64) * stride_k_n
    k = tl.load(
        k_block + column[None, :] * stride_k_n + channel[:, None] * stride_k_d,
        mask=is_key[None, :] & (channel[:, None] < D_HEAD),
        other=0.0,
    )  # [BLOCK_D, BLOCK_N]
    kept = kept_keys(key_mask_ptr, batch, key_pos, is_key, stride_mask_b, stride_mask_n, KEY_MASK)
    bias = 0.0
    if BIAS:
        bias_block = bias_ptr + batch * stride_bias_b + head * stride_bias_h
        bias_block += first_row.to(tl.int64) * stride_bias_m
        bias_block += tl.cast(first_key, tl.int64) * stride_bias_n
        bias = tl.load(
            bias_block + in_block[:, None] * stride_bias_m + column[None, :] * stride_bias_n,
            mask=(row[:, None] < n_queries) & is_key[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    return masked_scores(
        tl.dot(q, k, input_precision="ieee"),
        (offset + row)[:, None], key_pos[None, :], n_keys, scale, soft_cap, slope, window,
        kept[None, :], bias, CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
    )  # fmt: skip


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, key_mask_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_m, stride_q_h, stride_q_d,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_v_b, stride_v_n, stride_v_h, stride_v_d,
    stride_out_b, stride_out_m, stride_out_h,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group_size, n_queries, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head of one example, over every key they see."""
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    row_block = tl.program_id(0) % n_blocks
    batch_head = tl.program_id(0) // n_blocks
    batch = (batch_head // n_heads).to(tl.int64)
    head = batch_head % n_heads
    kv_head = (head // group_size).to(tl.int64)
    first_row = row_block * BLOCK_M

    in_block = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    row = first_row + in_block
    is_channel = channel < D_HEAD

    # Positions times strides may pass 2^31; what is left inside a block does not.
    q_block = q_ptr + batch * stride_q_b + head.to(tl.int64) * stride_q_h
    q_block += first_row.to(tl.int64) * stride_q_m
    q = tl.load(
        q_block + in_block[:, None] * stride_q_m + channel[None, :] * stride_q_d,
        mask=(row[:, None] < n_queries) & is_channel[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    low = 0
    if WINDOW:
        low = tl.maximum(0, offset + first_row - window + 1) // BLOCK_N * BLOCK_N
    high = n_keys
    if CAUSAL:
        high = tl.minimum(n_keys, offset + first_row + BLOCK_M)
    for first_key in range(low, high, BLOCK_N):
        scores = block_scores(
            q, k_ptr, key_mask_ptr, bias_ptr, slope,
            stride_k_b, stride_k_n, stride_k_h, stride_k_d,
            stride_mask_b, stride_mask_n,
            stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
            batch, head.to(tl.int64), kv_head, first_row, first_key,
            n_queries, n_keys, offset, window, scale, soft_cap,
            CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
            D_HEAD, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        weights, shrink, highest, total = weighed(scores, highest, total)
        v_block = v_ptr + batch * stride_v_b + kv_head * stride_v_h
        v_block += tl.cast(first_key, tl.int64) * stride_v_n
        v = tl.load(
            v_block + column[:, None] * stride_v_n + channel[None, :] * stride_v_d,
            mask=(first_key + column[:, None] < n_keys) & is_channel[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_D]
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")

    is_blind = total == 0.0
    divisor = tl.where(is_blind, 1.0, total)
    mixed = mixed / divisor[:, None]
    lse = tl.where(is_blind, -float("inf"), highest + tl.math.log2(divisor) * LN_2)
    is_row = row < n_queries
    tl.store(lse_ptr + batch_head.to(tl.int64) * n_queries + row, lse, mask=is_row)
    out_block = out_ptr + batch * stride_out_b + head.to(tl.int64) * stride_out_h
    out_block += first_row.to(tl.int64) * stride_out_m
    tl.store(
        out_block + in_block[:, None] * stride_out_m + channel[None, :],
        mixed.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_channel[None, :],
    )


@triton.jit
def row_scores(
    q, k_ptr, key_mask_ptr, bias_ptr, slope,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    batch, head, row, first_key, group_size, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores in nats of one query row on BLOCK_N keys from ``first_key`` on; products in float32.

    ``batch``, ``head`` and ``row`` are int64.
    """
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    key_pos = first_key + column
    is_key = key_pos < n_keys
    k_block = k_ptr + batch * stride_k_b + (head // group_size) * stride_k_h
    k_block += tl.cast(first_key, tl.int64) * stride_k_n
    k = tl.load(
        k_block + column[:, None] * stride_k_n + channel[None, :] * stride_k_d,
        mask=is_key[:, None] & (channel[None, :] < D_HEAD),
        other=0.0,
    ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    kept = kept_keys(key_mask_ptr, batch, key_pos, is_key, stride_mask_b, stride_mask_n, KEY_MASK)
    bias = 0.0
    if BIAS:
        bias_row = bias_ptr + batch * stride_bias_b + head * stride_bias_h + row * stride_bias_m
        bias = tl.load(
            bias_row + key_pos.to(tl.int64) * stride_bias_n, mask=is_key, other=0.0
        ).to(tl.float32)  # fmt: skip
    return masked_scores(
        tl.sum(k * q[None, :], 1),
        (offset + row).to(tl.int32), key_pos, n_keys, scale, soft_cap, slope, window, kept,
        bias, CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
    )  # fmt: skip


@triton.jit
def at_site(
    q_ptr, sites_ptr, slopes_ptr, stride_q_b, stride_q_m, stride_q_h, stride_q_d, site,
    ALIBI: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Example, head and query row of an entry of the table, the row itself, its ALiBi slope."""
    batch = tl.load(sites_ptr + site * 3)
    head = tl.load(sites_ptr + site * 3 + 1)
    row = tl.load(sites_ptr + site * 3 + 2)
    channel = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + batch * stride_q_b + row * stride_q_m + head * stride_q_h + channel * stride_q_d,
        mask=channel < D_HEAD,
        other=0.0,
    ).to(tl.float32)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)
    return batch, head, row, q, slope


@triton.jit
def pattern_rows_kernel(
    q_ptr, k_ptr, lse_ptr, sites_ptr, out_ptr, key_mask_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_m, stride_q_h, stride_q_d,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_heads, group_size, n_queries, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    SCORES: tl.constexpr, LSE_BY_SITE: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one (example, head, query row) of the pattern or the scores."""
    site = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(1) * BLOCK_N
    batch, head, row, q, slope = at_site(
        q_ptr, sites_ptr, slopes_ptr, stride_q_b, stride_q_m, stride_q_h, stride_q_d, site,
        ALIBI, D_HEAD, BLOCK_D,
    )  # fmt: skip
    out = row_scores(
        q, k_ptr, key_mask_ptr, bias_ptr, slope,
        stride_k_b, stride_k_n, stride_k_h, stride_k_d,
        stride_mask_b, stride_mask_n,
        stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        batch, head, row, first_key, group_size, n_keys, offset, window, scale, soft_cap,
        CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
        D_HEAD, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if not SCORES:
        if LSE_BY_SITE:
            lse = tl.load(lse_ptr + site)
        else:
            lse = tl.load(lse_ptr + (batch * n_heads + head) * n_queries + row)
        # A row that sees no key has minus infinity here, and scores of minus infinity.
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        out = tl.math.exp2((out - lse) * LOG2_E)
    key_pos = first_key + tl.arange(0, BLOCK_N)
    tl.store(
        out_ptr + site * n_keys + key_pos, out.to(out_ptr.dtype.element_ty), mask=key_pos < n_keys
    )


@triton.jit
def row_lse_kernel(
    q_ptr, k_ptr, sites_ptr, lse_ptr, key_mask_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_m, stride_q_h, stride_q_d,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    group_size, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of the scores of one (example, head, query row)."""
    site = tl.program_id(0).to(tl.int64)
    batch, head, row, q, slope = at_site(
        q_ptr, sites_ptr, slopes_ptr, stride_q_b, stride_q_m, stride_q_h, stride_q_d, site,
        ALIBI, D_HEAD, BLOCK_D,
    )  # fmt: skip
    # A row of a block of one, for the same arithmetic as the fused kernel's.
    highest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    query_pos = (offset + row).to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(0, query_pos - window + 1) // BLOCK_N * BLOCK_N
    high = n_keys
    if CAUSAL:
        high = tl.minimum(n_keys, query_pos + 1)
    for first_key in range(low, high, BLOCK_N):
        scores = row_scores(
            q, k_ptr, key_mask_ptr, bias_ptr, slope,
            stride_k_b, stride_k_n, stride_k_h, stride_k_d,
            stride_mask_b, stride_mask_n,
            stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
            batch, head, row, first_key, group_size, n_keys, offset, window, scale, soft_cap,
            CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
            D_HEAD, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        _, _, highest, total = weighed(scores[None, :], highest, total)
    is_blind = total == 0.0
    lse = highest + tl.math.log2(tl.where(is_blind, 1.0, total)) * LN_2
    tl.store(lse_ptr + site + tl.arange(0, 1), tl.where(is_blind, -float("inf"), lse))
