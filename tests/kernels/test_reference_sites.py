"""The specification of the ops on sites, on cases worked out by hand."""

import torch

from fastlens.kernels import reference

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
TABLE = torch.tensor([[1, 0], [0, 1]])


def test_patch_sites_by_hand():
    v = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    found = {
        mode: reference.patch_sites(X, TABLE, None if mode == "zero" else v, mode)
        for mode in ("replace", "add", "scale", "zero")
    }
    assert found["replace"].tolist() == [[[1, 2], [30, 40]], [[10, 20], [7, 8]]]
    assert found["add"].tolist() == [[[1, 2], [33, 44]], [[15, 26], [7, 8]]]
    assert found["scale"].tolist() == [[[1, 2], [90, 160]], [[50, 120], [7, 8]]]
    assert found["zero"].tolist() == [[[1, 2], [0, 0]], [[0, 0], [7, 8]]]
    mean = reference.patch_sites(X, TABLE, X, "mean")
    assert mean.tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]


def test_capture_by_hand():
    assert reference.capture(X, TABLE, torch.float16).tolist() == [[5, 6], [3, 4]]
    whole = reference.capture(X, torch.zeros(1, 0, dtype=torch.long), torch.float32)
    assert torch.equal(whole, X[None]) and whole.data_ptr() != X.data_ptr()


def test_capture_int8_by_hand():
    values, scale = reference.capture_int8(X * 127, TABLE)
    assert values.tolist() == [[106, 127], [95, 127]] and scale.tolist() == [6, 4]


def test_nothing_to_do():
    none = torch.zeros(0, 2, dtype=torch.long)
    assert torch.equal(reference.patch_sites(X, none, torch.zeros(2), "replace"), X)
    assert reference.capture(X, none, torch.float32).shape == (0, 2)
    values, scale = reference.capture_int8(X[..., :0], TABLE)
    assert values.shape == (2, 0) and scale.tolist() == [0, 0]
