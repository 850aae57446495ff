"""xIELU against Hugging Face's module."""

import torch

from fastlens.components.xielu import XIELU
from tests.close import assert_close_to


def test_xielu_equals_hugging_face():
    from transformers.activations import XIELUActivation

    theirs = XIELUActivation(dtype=torch.float32, with_vector_loads=False)
    ours = XIELU()
    x = torch.linspace(-4, 4, 81)
    assert_close_to(ours(x), theirs._xielu_python(x), atol=1e-6)
    ours(x).sum().backward()
    assert ours.alpha_p.grad != 0 and ours.alpha_n.grad != 0
