"""The table of what a cache holds."""

import re

import torch

from fastlens import ActivationCache
from fastlens.cache.summary import place_of, ranges
from fastlens.hooks.derived import CacheDict, Derived
from fastlens.ops.outlier_rows import capture_int8_outliers
from tests.models import ours, prompts


def test_a_line_per_place_and_the_total():
    resid = torch.zeros(1, 4, 64)
    packed = capture_int8_outliers(torch.randn(1, 4, 64))
    entries = CacheDict()
    entries.put("blocks.0.hook_resid_post", resid)
    entries.put("blocks.1.hook_resid_pre", resid)
    entries.put("blocks.0.hook_mlp_out", packed)
    entries.put("blocks.1.hook_mlp_out", packed.to("cpu").on(torch.clone))
    entries.put("double", Derived("double", lambda x: 2 * x, {"x": resid}, (1, 4, 64), resid.dtype))
    cache = ActivationCache(entries, None)
    one = packed.nbytes
    lines = [re.split(r"\s{2,}", line.strip()) for line in cache.summary().splitlines()]
    assert lines == [
        ["place", "entries", "shape", "dtype", "bytes", "how"],
        ["blocks.0.hook_resid_post", "1", "[1, 4, 64]", "float32", "1,024", "stored"],
        ["blocks.1.hook_resid_pre", "1", "[1, 4, 64]", "float32", "0", "shared"],
        ["blocks.0-1.hook_mlp_out", "2", "[1, 4, 64]", "float32", str(2 * one), "packed"],
        ["double", "1", "[1, 4, 64]", "float32", "0", "computed when read"],
        ["total", "5", f"{1024 + 2 * one:,}", "0.0 MiB"],
    ]
    assert cache.nbytes == 1024 + 2 * one


def test_the_bytes_add_up_and_nothing_is_computed():
    _, cache = ours("gpt2").run_with_cache(prompts())
    before = cache.nbytes
    rows = cache.summary().splitlines()[1:-1]
    columns = [re.search(r"([\d,]+)  (stored|shared|computed when read)$", row) for row in rows]
    assert sum(int(found[1].replace(",", "")) for found in columns if found) == before
    assert cache.nbytes == before and all(columns)


def test_names_and_ranges():
    assert place_of("blocks.3.hook_q") == ("blocks.{}.hook_q", 3)
    assert place_of("hook_embed") == ("hook_embed", None)
    assert ranges([0, 1, 2, 5]) == "0-2,5" and ranges([]) == ""
