"""What is summed over each row of the attention pattern, without the pattern. Not run on a GPU."""

import triton
import triton.language as tl

from fastlens.kernels.jit.attention import (
    LN_2,
    LOG2_E,
    block_scores,
    kept_keys,
    masked_scores,
    weighed,
)


@triton.jit
def attention_summary_kernel(
    q_ptr, k_ptr, heads_ptr, lse_ptr, entropy_ptr, mass_ptr, query_labels_ptr, key_labels_ptr,
    key_mask_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_m, stride_q_h, stride_q_d,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_batch, n_heads, group_size, n_queries, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr, N_GROUPS: tl.constexpr, STRICT: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one kept head of one example, over every key they see.

    Entropy in nats, unless it is not asked for, and the mass on the keys of each of N_GROUPS
    groups: those with the query's label; without its own position if the group's bit of STRICT is
    set. HAS_LSE spares the running maximum: weights are ``exp(score - lse)``, and still divided by
    their sum, which is 1 but for rounding. Else the log-sum-exp is left in ``lse``. ``n_heads``
    counts the kept heads, which ``heads`` names.
    """
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    first_row = (tl.program_id(0) % n_blocks) * BLOCK_M
    batch_head = tl.program_id(0) // n_blocks
    batch = (batch_head // n_heads).to(tl.int64)
    head = tl.load(heads_ptr + batch_head % n_heads)
    kv_head = head // group_size

    in_block = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    group = tl.arange(0, BLOCK_G)
    row = first_row + in_block
    is_row = row < n_queries
    query_pos = offset + row
    is_channel = channel < D_HEAD
    q_block = q_ptr + batch * stride_q_b + head * stride_q_h
    q_block += first_row.to(tl.int64) * stride_q_m
    q = tl.load(
        q_block + in_block[:, None] * stride_q_m + channel[None, :] * stride_q_d,
        mask=is_row[:, None] & is_channel[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)

    statistics = batch_head.to(tl.int64) * n_queries + row
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if HAS_LSE:
        highest = tl.load(lse_ptr + statistics, mask=is_row, other=-float("inf"))
    total = tl.zeros([BLOCK_M], tl.float32)
    # The sum of weight * (score - highest), from which the entropy follows.
    moment = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)

    low = 0
    if WINDOW:
        low = tl.maximum(0, offset + first_row - window + 1) // BLOCK_N * BLOCK_N
    high = n_keys
    if CAUSAL:
        high = tl.minimum(n_keys, offset + first_row + BLOCK_M)
    for first_key in range(low, high, BLOCK_N):
        key_pos = first_key + column
        is_key = key_pos < n_keys
        scores = block_scores(
            q, k_ptr, key_mask_ptr, bias_ptr, slope,
            stride_k_b, stride_k_n, stride_k_h, stride_k_d,
            stride_mask_b, stride_mask_n,
            stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
            batch, head, kv_head, first_row, first_key,
            n_queries, n_keys, offset, window, scale, soft_cap,
            CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
            D_HEAD, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        before = highest
        if HAS_LSE:
            # Of a row that sees no key all scores are minus infinity too.
            safe = tl.where(highest == -float("inf"), 0.0, highest)
            weights = tl.math.exp2((scores - safe[:, None]) * LOG2_E)
            total += tl.sum(weights, 1)
        else:
            weights, shrink, highest, new_total = weighed(scores, highest, total)
            safe = tl.where(highest == -float("inf"), 0.0, highest)
            lowered = tl.where(before == -float("inf"), 0.0, before - safe)
            moment = (moment + total * lowered) * shrink
            mass = mass * shrink[:, None]
            total = new_total
        # Zero times minus infinity is no number.
        below = tl.where(scores == -float("inf"), 0.0, scores - safe[:, None])
        moment += tl.sum(weights * below, 1)
        for g in tl.static_range(N_GROUPS):
            query_label = tl.load(
                query_labels_ptr + (g * n_batch + batch) * n_queries + row, mask=is_row, other=-1
            )
            key_label = tl.load(
                key_labels_ptr + (g * n_batch + batch) * n_keys + key_pos, mask=is_key, other=-2
            )
            same = (query_label[:, None] == key_label[None, :]) & (query_label[:, None] >= 0)
            if (STRICT >> g) & 1:
                same = same & (query_pos[:, None] != key_pos[None, :])
            in_group = tl.sum(tl.where(same, weights, 0.0), 1)
            mass += tl.where(group[None, :] == g, in_group[:, None], 0.0)

    is_blind = total == 0.0
    divisor = tl.where(is_blind, 1.0, total)
    mass = mass / divisor[:, None]
    # log(sum) - sum(weight * score) / sum, with scores counted from the highest.
    entropy = tl.math.log2(divisor) * LN_2 - moment / divisor
    if not HAS_LSE:
        lse = tl.where(is_blind, -float("inf"), highest + tl.math.log2(divisor) * LN_2)
        tl.store(lse_ptr + statistics, lse, mask=is_row)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + statistics, entropy, mask=is_row)
    if N_GROUPS > 0:
        n_rows = tl.cast(n_batch, tl.int64) * n_heads * n_queries
        tl.store(
            mass_ptr + group[None, :] * n_rows + statistics[:, None],
            mass,
            mask=is_row[:, None] & (group[None, :] < N_GROUPS),
        )


@triton.jit
def offset_mass_kernel(
    q_ptr, k_ptr, heads_ptr, lse_ptr, offsets_ptr, mass_ptr, key_mask_ptr, slopes_ptr, bias_ptr,
    stride_q_b, stride_q_m, stride_q_h, stride_q_d,
    stride_k_b, stride_k_n, stride_k_h, stride_k_d,
    stride_mask_b, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    n_batch, n_heads, group_size, n_queries, n_keys, offset, window, scale, soft_cap,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr, KEY_MASK: tl.constexpr, BIAS: tl.constexpr,
    D_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the mass that BLOCK_M query rows put on the one key a given offset before."""
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    first_row = (tl.program_id(0) % n_blocks) * BLOCK_M
    rest = tl.program_id(0) // n_blocks
    batch_head = rest % (n_batch * n_heads)
    which = (rest // (n_batch * n_heads)).to(tl.int64)
    batch = (batch_head // n_heads).to(tl.int64)
    head = tl.load(heads_ptr + batch_head % n_heads)
    channel = tl.arange(0, BLOCK_D)
    row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    query_pos = offset + row
    key_pos = query_pos - tl.load(offsets_ptr + which)
    is_row = row < n_queries
    is_key = is_row & (key_pos >= 0) & (key_pos < n_keys)
    inside = is_key[:, None] & (channel[None, :] < D_HEAD)
    q = tl.load(
        q_ptr + batch * stride_q_b + head * stride_q_h
        + row[:, None] * stride_q_m + channel[None, :] * stride_q_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_M, BLOCK_D]  # fmt: skip
    k = tl.load(
        k_ptr + batch * stride_k_b + (head // group_size) * stride_k_h
        + key_pos[:, None] * stride_k_n + channel[None, :] * stride_k_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_M, BLOCK_D]  # fmt: skip
    kept = kept_keys(key_mask_ptr, batch, key_pos, is_key, stride_mask_b, stride_mask_n, KEY_MASK)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head)
    bias = 0.0
    if BIAS:
        bias = tl.load(
            bias_ptr + batch * stride_bias_b + head * stride_bias_h
            + row * stride_bias_m + key_pos * stride_bias_n,
            mask=is_key,
            other=0.0,
        ).to(tl.float32)  # fmt: skip
    scores = masked_scores(
        tl.sum(q * k, 1), query_pos, key_pos, n_keys, scale, soft_cap, slope, window, kept,
        bias, CAUSAL, WINDOW, SOFT_CAP, ALIBI, KEY_MASK, BIAS,
    )  # fmt: skip
    statistics = batch_head.to(tl.int64) * n_queries + row
    lse = tl.load(lse_ptr + statistics, mask=is_row, other=0.0)
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    mass = tl.where(is_key, tl.math.exp2((scores - lse) * LOG2_E), 0.0)
    n_rows = tl.cast(n_batch, tl.int64) * n_heads * n_queries
    tl.store(mass_ptr + which * n_rows + statistics, mass, mask=is_row)
