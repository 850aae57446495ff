"""bfloat16 in Triton's interpreter: right with the correction, and shown to be wrong without."""

import torch

from tests.gpu.marks import NEEDS_TRITON
from tests.gpu.workers import interpreted

pytestmark = NEEDS_TRITON


def kernel_results():
    """Each operation of a small kernel on bfloat16, and what torch says."""
    from tests.gpu import bf16_kernel

    torch.manual_seed(0)
    return bf16_kernel.results()


def test_every_operation_is_torchs():
    for name, (found, wanted) in interpreted(kernel_results).items():
        assert torch.equal(found, wanted), name


def test_without_the_correction_it_is_wrong():
    results = interpreted(kernel_results, corrected=False)
    wrong = {name for name, (found, wanted) in results.items() if not torch.equal(found, wanted)}
    assert {"sum", "product", "rounding", "dot"} <= wrong
