"""Single rows of patterns in plain PyTorch: those that read the same keys at a time."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastlens.kernels.kernel import Kernel
from fastlens.kernels.masks import AttentionRule, alibi_slopes
from fastlens.kernels.score_blocks import softmax


def attention_pattern_rows(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    rule: AttentionRule,
    sites: Int[Tensor, "site 3"],
    offset: int = 0,
    key_mask: Bool[Tensor, "batch key_pos"] | None = None,
    lse: Float[Tensor, "batch head query_pos"] | None = None,
    scores: bool = False,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None = None,
) -> Float[Tensor, "site key_pos"]:
    """See `fastlens.ops.attention_pattern.attention_pattern_rows`. No gradient of its own."""
    dtype = torch.promote_types(torch.float32, q.dtype)
    n_heads, n_keys = q.shape[2], k.shape[1]
    sites = sites.to(q.device)
    slopes = alibi_slopes(n_heads, q.device, dtype) if rule.alibi else None
    out = q.new_empty(len(sites), n_keys, dtype=dtype)
    for (example, kv_head), members in _by_keys(sites, n_heads // k.shape[2]):
        _, head, row = sites[members].unbind(1)
        queries = q[example, row, head].to(dtype) / rule.scale
        found = queries @ k[example, :, kv_head].to(dtype).T
        if rule.soft_cap > 0:
            found = found.div_(rule.soft_cap).tanh_().mul_(rule.soft_cap)
        behind = torch.arange(n_keys, device=q.device) - (row + offset)[:, None]
        if slopes is not None:
            found += slopes[head][:, None] * behind.clamp(max=0)
        if bias is not None:
            of_example, of_head = (0 if n == 1 else i for n, i in _which(bias, example, head))
            found += bias[of_example, of_head, row]
        hidden = behind > 0 if rule.causal else None
        if rule.window is not None:
            far = behind <= -rule.window
            hidden = far if hidden is None else hidden | far
        if key_mask is not None:
            padding = ~key_mask[example]
            hidden = padding[None] if hidden is None else hidden | padding
        if hidden is not None:
            found.masked_fill_(hidden, -torch.inf)
        out[members] = found
    if scores:
        return out
    if lse is None:
        return softmax(out)
    of_rows = lse[tuple(sites.unbind(1))].to(dtype)
    # A row that sees no key has weights exp(-inf - inf).
    return out.sub_(of_rows.masked_fill(of_rows == -torch.inf, torch.inf)[:, None]).exp_()


def _by_keys(sites: Tensor, group: int) -> list[tuple[tuple[int, int], Tensor]]:
    """Sites that read the same keys: (example, KV head) and which sites of the table they are."""
    if not len(sites):
        return []
    pairs = torch.stack([sites[:, 0], sites[:, 1] // group], 1)
    distinct, which = pairs.unique(dim=0, return_inverse=True)
    return [
        ((example, kv_head), (which == number).nonzero()[:, 0])
        for number, (example, kv_head) in enumerate(distinct.tolist())
    ]


def _which(bias: Tensor, example: int, head: Tensor) -> list[tuple[int, int | Tensor]]:
    """The lengths of the first two axes, which may be shared, with what is wanted of them."""
    return [(bias.shape[0], example), (bias.shape[1], head)]


def _refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


KERNEL = Kernel(
    "attention_pattern_rows", "torch by shared keys", attention_pattern_rows, _refuses, priority=10
)
