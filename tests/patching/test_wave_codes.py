"""Codes in the wave: each run is a hooked run, and costs only what it changes."""

import random

import pytest
import torch

from fastlens.errors import SweepError
from fastlens.patching import Patch, codes, sweep, wave_codes
from fastlens.patching.plan import COUNTED
from fastlens.patching.sites import CODED, available_sites
from fastlens.patching.uses import uses_of
from fastlens.patching.wave import Wave
from tests.models import ours
from tests.patching.against_hooks import (
    MODES,
    check,
    hooked_logits,
    least_memory,
    mask_of,
    pairs,
    planned,
    random_patch,
    wave_logits,
)
from tests.patching.autoencoders import Curved, Heads, Linear, Scaled, TopK

N_POS, N_FEATURES = 6, 24
KINDS = {"linear": Linear, "curved": Curved, "top-k": TopK, "scaled": Scaled}


def double(name, **changes):
    return ours(name, dtype=torch.float64, **changes)


def placed_at(site, layer, kind, seed=0, width=32):
    """Codes of an autoencoder of its own."""
    sae = KINDS[kind](width, N_FEATURES, seed)
    known = kind in ("linear", "top-k") and seed % 2 == 0
    return codes(sae, layer=layer, site=site, decoder=sae.W_dec if known else None)


def random_codes_patch(found, batch, rng):
    """A patch of some random features at some positions."""

    def some(size):
        one, three = rng.randrange(size), rng.sample(range(size), 3)
        return rng.choice([None, one, three, sorted(three)])

    feature, pos = some(N_FEATURES), some(N_POS)
    kinds = ["other", "other", "zero", "number", "mean", "tensor"]
    kind = rng.choice(kinds if batch == 1 else [*kinds, "resample"])
    source = {"number": 0.75}.get(kind, kind)
    if kind == "tensor":
        n = N_FEATURES if feature is None else 1 if isinstance(feature, int) else len(feature)
        generator = torch.Generator().manual_seed(rng.randrange(2**30))
        source = torch.randn(batch, 1, n, generator=generator, dtype=torch.float64)
    return Patch(found, pos=pos, feature=feature, source=source, mode=rng.choice(MODES))


def mixed(model, batch, seed):
    """Runs of codes alone, of several autoencoders in one place, and of them with other patches."""
    rng = random.Random(seed)
    have = [site for site in CODED if site in available_sites(model.cfg, model.hook_dict)]
    n_layers = model.cfg.n_layers
    everything = [
        placed_at(site, rng.randrange(n_layers), kind, number)
        for number, (site, kind) in enumerate((site, kind) for site in have for kind in KINDS)
    ]
    same_place = [placed_at("resid_pre", 1, kind, 40 + i) for i, kind in enumerate(KINDS)]
    runs = [[random_codes_patch(found, batch, rng)] for found in everything]
    sites = [s for s in available_sites(model.cfg, model.hook_dict) if s not in ("attn_in",)]
    for number in range(10):
        some = rng.sample(same_place if number % 2 else everything, 2)
        patches = [random_codes_patch(found, batch, rng) for found in rng.choices(some, k=3)]
        for _ in range(rng.randint(0, 2)):
            near = rng.choice(["resid_pre", *sites])
            patches.append(
                random_patch(model, N_POS, near, rng.randrange(n_layers), "replace", "other", rng,
                             None)
            )  # fmt: skip
        rng.shuffle(patches)
        runs.append(patches)
    # What stands in the same stream under two names.
    runs.append([
        Patch("resid_pre", 1, pos=2, source=0.5),
        Patch(same_place[0], pos=2, feature=[1, 2], source="zero"),
        Patch(
            placed_at("resid_post", 0, "linear", 3),
            pos=2, feature=[2, 3], source=1.0, mode="add",
        ),
        Patch("resid_post", 0, pos=2, source=2.0, mode="scale"),
    ])  # fmt: skip
    return runs


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_every_run_is_a_hooked_run(name, batch, padding):
    model = double(name)
    runs = mixed(model, batch, seed=batch + len(padding))
    clean, corrupted = pairs(batch, N_POS)
    mask = mask_of(padding, batch, N_POS)
    query = planned(model, clean, corrupted, runs, mask=mask)
    expected = check(query)
    small = planned(model, clean, corrupted, runs, mask=mask, memory=least_memory(query))
    assert len(small.plan.chunks) > 1
    check(small, expected)


@pytest.mark.parametrize("name", ["attn_only", "post_norm", "qk_norm", "bidirectional", "local"])
def test_other_families(name):
    model = double(name)
    clean, corrupted = pairs(2, N_POS)
    runs = mixed(model, 2, seed=7)
    query = planned(model, clean, corrupted, runs, reads=[0, -1], direction="noising")
    check(query)


@pytest.mark.parametrize("bytes_held", [1, 4 * 3 * N_FEATURES * 8])
def test_codes_held_at_once_change_nothing(bytes_held, monkeypatch):
    model = double("gpt2")
    clean, corrupted = pairs(3, N_POS)
    query = planned(model, clean, corrupted, mixed(model, 3, seed=1))
    expected = wave_logits(query)
    monkeypatch.setattr(wave_codes, "CODES_BYTES", bytes_held)
    check(query, expected)


def test_z_with_its_heads_apart():
    model = double("llama")
    clean, corrupted = pairs(2, N_POS)
    flat, apart = Linear(32, N_FEATURES), Heads(32, N_FEATURES)
    runs = [
        [Patch(codes(sae, layer=1, site="z", decoder=decoder), feature=[0, 3, 5])]
        for sae, decoder in ((flat, None), (apart, None), (flat, flat.W_dec), (apart, apart.W_dec))
    ]
    found = check(planned(model, clean, corrupted, runs))
    for one in found[1:]:
        assert float((one - found[0]).abs().max()) < 1e-12


def test_the_oracle_is_the_definition():
    """``x + decode(c') - decode(c)``, written out."""
    model, sae = double("gpt2"), Curved(32, N_FEATURES)
    clean, corrupted = pairs(2, N_POS)

    def edit(x, hook):
        c = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        edited = c.clone()
        edited[:, 4, 3] = 0.25
        edited[:, 4, 9] += 0.25
        decoded = [torch.tanh(one @ sae.W_dec + sae.b_dec) for one in (edited, c)]
        return x + decoded[0] - decoded[1]

    found = codes(sae, layer=1, site="mlp_out")
    run = [
        Patch(found, pos=4, feature=3, source=0.25),
        Patch(found, pos=4, feature=9, source=0.25, mode="add"),
    ]
    query = planned(model, clean, corrupted, [run])
    with torch.no_grad():
        expected = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_mlp_out", edit)])
        assert float((expected - model(corrupted)).abs().max()) > 1e-3
    for got in (wave_logits(query), hooked_logits(query)):
        assert float((got[0, :, 0] - expected[:, -1]).abs().max()) < 1e-12


def test_plain_patches_of_a_place_act_first_and_codes_of_one_autoencoder_together():
    model = double("gpt2")
    clean, corrupted = pairs(1, N_POS)
    first, second = (placed_at("resid_pre", 1, "linear", seed) for seed in (0, 1))
    plain = Patch("resid_pre", 1, pos=3)
    a = [Patch(first, pos=3, feature=f, source=2.0, mode="add") for f in (1, 2)]
    b = Patch(second, pos=3, source=3.0)
    orders = [[plain, *a, b], [a[0], b, plain, a[1]], [b, *a, plain]]
    found = check(planned(model, clean, corrupted, orders))
    assert torch.equal(found[0], found[1])
    assert float((found[2] - found[0]).abs().max()) > 1e-6
    # Two patches of one entry act in their order.
    two, scaled, six = (
        Patch(first, pos=3, feature=1, source=source, mode=mode)
        for source, mode in ((2.0, "replace"), (3.0, "scale"), (6.0, "replace"))
    )
    found = check(planned(model, clean, corrupted, [[two, scaled], six]))
    assert float((found[0] - found[1]).abs().max()) < 1e-12


def wave_of(query):
    wave = Wave(
        *(query.model, query.plan.frame, query.stem, query.sources, query.prompts.n_pos),
        codes=query.codes,
    )
    with torch.no_grad():
        return wave.run(uses_of(query.plan, query.plan.chunks[0]))


def test_features_that_are_not_active_cost_no_rows():
    model, sae = double("gpt2"), Linear(32, N_FEATURES)
    clean, corrupted = pairs(1, N_POS)
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted)
        active = sae.encode(cache["resid_pre", 1])[0, 4] > 0
    assert 0 < int(active.sum()) < N_FEATURES
    found = codes(sae, layer=1, site="resid_pre", decoder=sae.W_dec)
    runs = [Patch(found, pos=4, feature=f, source="zero") for f in range(N_FEATURES)]
    query = planned(model, clean, corrupted, runs)
    final = wave_of(query)
    planned_rows = query.plan.counts[:, COUNTED.index("queries")]
    taken = final.counts[:, COUNTED.index("queries")].numpy() - query.plan.base_counts()[:, 1]
    assert planned_rows.tolist() == [0, N_FEATURES, N_FEATURES]
    assert taken.tolist() == [0, int(active.sum()), int(active.sum())]
    scores = sweep(
        model, clean, corrupted, runs=runs, metric=lambda x: x[:, -1].square().sum(-1), verify="all"
    )
    unchanged = scores.values == scores.reference
    assert torch.equal(unchanged, ~active)


def test_one_that_changes_nothing_leaves_the_runs_later_patches():
    model, sae = double("gpt2"), Linear(32, N_FEATURES)
    clean, corrupted = pairs(2, N_POS)
    found = codes(sae, layer=0, site="resid_mid", decoder=sae.W_dec)
    nothing = Patch(found, source=0.0, mode="add")
    later = Patch("resid_pre", 2, pos=-1)
    got = check(planned(model, clean, corrupted, [[nothing], [later], [nothing, later]]))
    assert torch.equal(got[1], got[2]) and not torch.equal(got[0], got[1])


def test_each_distinct_row_is_encoded_once():
    model, sae = double("gpt2"), Linear(32, N_FEATURES)
    clean, corrupted = pairs(2, N_POS)
    found = codes(sae, layer=1, site="resid_pre", decoder=sae.W_dec)
    runs = [Patch(found, pos=p, feature=f) for p in (3, 4) for f in range(N_FEATURES)]
    query = planned(model, clean, corrupted, runs)
    sae.encoded.clear()
    wave_of(query)
    # Two positions of two examples (where the prompts differ by then), in both prompts.
    assert sum(sae.encoded) <= 8


def test_no_more_codes_are_held_than_said(monkeypatch):
    model, sae = double("gpt2"), Curved(32, N_FEATURES)
    clean, corrupted = pairs(3, N_POS)
    found = codes(sae, layer=1, site="resid_pre")
    runs = [Patch(found, pos=p, feature=f) for p in range(N_POS) for f in range(N_FEATURES)]
    query = planned(model, clean, corrupted, [*runs, Patch(found)])
    monkeypatch.setattr(wave_codes, "CODES_BYTES", 4 * 5 * N_FEATURES * 8)
    expected = hooked_logits(query)
    sae.encoded.clear()
    check(query, expected)
    assert max(sae.encoded) == 5


def test_nan_is_refused():
    class Broken(Linear):
        is_broken = False

        def encode(self, x):
            return super().encode(x) / (0.0 if self.is_broken else 1.0)

    model = double("gpt2")
    clean, corrupted = pairs(1, N_POS)
    sae = Broken(32, N_FEATURES)
    query = planned(model, clean, corrupted, [Patch(codes(sae, layer=0, site="mlp_out"))])
    sae.is_broken = True
    with pytest.raises(SweepError, match="mlp_out codes at blocks.0.hook_mlp_out gives NaN"):
        wave_logits(query)
