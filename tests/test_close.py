"""The comparison helpers must fail when they should."""

import pytest
import torch

from tests.close import assert_close_to, assert_no_worse


def test_equal_values_pass_with_infinities_and_nan_in_the_same_places():
    values = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    assert_close_to(values, values.clone())
    assert_close_to([1.0, 2.0], (1.0, 2.0))
    assert_close_to(torch.empty(0), torch.empty(0))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 1.001])
def test_one_wrong_value_fails_and_is_named(wrong):
    truth = torch.ones(2, 3)
    actual = truth.clone()
    actual[1, 2] = wrong
    with pytest.raises(AssertionError, match=r"logits: 1 of 6 .*\n  at \[1, 2\]"):
        assert_close_to(actual, truth, name="logits")


def test_a_nan_truth_is_not_met_by_a_number():
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close_to(torch.zeros(2), torch.tensor([0.0, torch.nan]))
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_close_to(torch.zeros(2), torch.tensor([0.0, torch.inf]), rtol=1.0)


def test_shapes_are_compared_before_broadcasting():
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), truth has \(2, 3\)"):
        assert_close_to(torch.zeros(1, 3), torch.zeros(2, 3))


def test_relative_tolerance_scales_with_truth():
    truth = torch.tensor([1.0, 1000.0])
    assert_close_to(truth * 1.009, truth, atol=0.0, rtol=0.01)
    with pytest.raises(AssertionError):
        assert_close_to(truth + 0.5, truth, atol=0.0, rtol=0.01)


def test_no_worse_judges_by_eagers_own_error():
    truth = torch.linspace(0.1, 1.0, 16, dtype=torch.float64)
    eager = (truth + 1e-3).float()
    assert_no_worse((truth + 1.9e-3).float(), eager, truth)
    with pytest.raises(AssertionError, match=r"error is 2\.5. x eager's"):
        assert_no_worse((truth - 2.5e-3).float(), eager, truth)
    assert_no_worse((truth - 2.5e-3).float(), eager, truth, factor=3)


def test_no_worse_allows_one_rounding_step_where_eager_is_exact():
    truth = torch.ones(4, dtype=torch.float64)
    assert_no_worse(truth.float() + 2**-23, truth.float(), truth)
    with pytest.raises(AssertionError):
        assert_no_worse(truth.float() + 2**-22, truth.float(), truth)


def test_no_worse_refuses_nan_from_either_side():
    truth = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_no_worse(torch.full((4,), torch.nan), truth.float(), truth)
    with pytest.raises(AssertionError, match="eager itself"):
        assert_no_worse(truth.float(), torch.full((4,), torch.nan), truth)
