"""Spans are plain records."""

import torch

from fastlens.kernels.spans import Span


def test_a_span_names_branches_and_positions():
    span = Span(torch.tensor([3, 1]), 2, 5)
    branches, start, stop = span
    assert branches is span.branches and (start, stop) == (2, 5)
    assert span._replace(start=4).start == 4
