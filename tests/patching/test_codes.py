"""`codes`: where an autoencoder stands, what is refused, and sweeps over features."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastlens.errors import SourceError, SweepError
from fastlens.patching import Patch, codes, logit_diff, plan, sweep
from fastlens.patching.codes import placed
from fastlens.patching.strategy import ALONE, STACKED, WAVE
from tests.close import assert_close_to
from tests.models import ours
from tests.patching.against_hooks import pairs
from tests.patching.autoencoders import Curved, Heads, Linear, Scaled, TopK, TopKOfBatch
from tests.patching.budgets import memory_for_rows

N_POS, N_FEATURES = 6, 24
METRIC = logit_diff(7, 3)


def double(name="gpt2", **changes):
    return ours(name, dtype=torch.float64, **changes)


def at(hook, kind=Linear, **fields):
    """An autoencoder that says where it stands, as SAELens' do."""
    sae = kind(32, N_FEATURES)
    metadata = SimpleNamespace(**{"hook_name": hook, "hook_name_out": None, **fields})
    sae.cfg = SimpleNamespace(d_in=32, metadata=metadata)
    return sae


def planned(sites, model=None, clean=None, corrupted=None, metric=METRIC, **options):
    if clean is None:
        clean, corrupted = pairs(1, N_POS)
    return plan(model or double(), clean, corrupted, sites=sites, metric=metric, **options)


# -- where it stands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "layer", "site"),
    [
        ("blocks.1.hook_resid_pre", 1, "resid_pre"),
        ("blocks.12.hook_mlp_out", 12, "mlp_out"),
        ("blocks.0.attn.hook_z", 0, "z"),
    ],
)
def test_an_autoencoder_says_where_it_stands(hook, layer, site):
    found = codes(at(hook))
    assert (list(found.by_layer), found.site, found.name) == ([layer], site, f"{site} codes")
    older = Linear(32, N_FEATURES)
    older.cfg = SimpleNamespace(hook_name=hook)
    assert codes(older).site == site


def test_what_is_given_wins():
    found = codes(at("blocks.1.hook_resid_pre"), layer=2, site="hook_resid_mid", name="mine")
    assert (list(found.by_layer), found.site, found.name) == ([2], "resid_mid", "mine")
    # What it says need not be a site then.
    assert codes(at("blocks.1.ln1.hook_normalized"), layer=-1, site="resid_pre").site == "resid_pre"


def test_several_layers():
    saes = [at(f"blocks.{layer}.hook_resid_pre") for layer in (2, 0)]
    assert list(codes(saes).by_layer) == [2, 0]
    found = codes({-1: saes[0], 0: saes[1]})
    query = planned(found, by=("layer", "feature"), features=[5, 3])
    assert query.grid.labels == {"layer": ["L2", "L0"], "feature": ["F5", "F3"]}
    assert [run.patches[0].layer for run in query.runs] == [2, 2, 0, 0]
    hooks = [query.codes[run.patches[0].codes].hook for run in query.runs]
    assert hooks == ["blocks.2.hook_resid_pre"] * 2 + ["blocks.0.hook_resid_pre"] * 2
    chosen = planned(found, layers=0, window=1)
    assert chosen.grid.labels["layer"] == ["L0"] and len(chosen.codes) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: codes([]), "no autoencoder"),
        (lambda: codes(nn.Linear(3, 3)), "Linear has no encode and decode"),
        (lambda: codes(Linear(32, 4)), "does not say where it stands"),
        (lambda: codes([Linear(32, 4)]), "dict: layer"),
        (lambda: codes(Linear(32, 4), layer=1), "Give site=, one of resid_pre, "),
        (lambda: codes({0: Linear(32, 4)}), "Give site="),
        (lambda: codes({0: Linear(32, 4)}, layer=1, site="z"), "go with one autoencoder"),
        (lambda: codes([at("blocks.0.attn.hook_z")], decoder=torch.eye(3)), "go with one"),
        (lambda: codes(Linear(32, 4), layer=1, site="mlp_ou"), "Nearest: 'mlp_out'"),
        (lambda: codes(at("blocks.1.ln1.hook_normalized")), "reads 'blocks.1.ln1.hook_normalized'"),
        (lambda: codes([at("blocks.0.attn.hook_z"), at("blocks.0.attn.hook_z")]), "in one layer"),
        (
            lambda: codes([at("blocks.0.attn.hook_z"), at("blocks.1.hook_mlp_out")]),
            "one site but mlp_out, z",
        ),
        (
            lambda: codes(at("blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out")),
            "writes blocks.1.hook_mlp_out: a transcoder",
        ),
        (lambda: codes(at("blocks.1.attn.hook_z", hook_head_index=3)), "head 3 alone"),
    ],
)
def test_what_is_no_site(make, match):
    with pytest.raises(SweepError, match=match):
        make()


# -- what fits the model -------------------------------------------------------------------------


class Wrong(Linear):
    """An autoencoder with one method replaced."""

    def __init__(self, **methods):
        super().__init__(32, N_FEATURES)
        for name, method in methods.items():
            setattr(self, name, method)


@pytest.mark.parametrize(
    ("sae", "options", "match"),
    [
        (
            Linear(16, 4),
            {},
            r"cannot encode and decode activations of shape \[4, 32\], as blocks.1",
        ),
        (Wrong(encode=lambda x: (x, x)), {}, "encode gives a tuple, not a tensor"),
        (Wrong(encode=lambda x: x[0, :N_FEATURES]), {}, "makes codes of shape"),
        (Wrong(decode=lambda c: c), {}, "writes 24 numbers for each row; blocks.1"),
        (Wrong(encode=lambda x: x[:, :N_FEATURES] / 0 * 0), {}, "gives NaN. Are its weights"),
        (TopKOfBatch(32, N_FEATURES), {}, "other codes beside other rows"),
        (Curved(32, N_FEATURES), {"decoder": Linear(32, N_FEATURES).W_dec}, "is not c @ decoder"),
        (Linear(32, N_FEATURES), {"decoder": torch.eye(4)}, r"must be \[24, 32\]"),
        (Scaled(32, N_FEATURES), {"decoder": torch.eye(4)}, "is no matrix. Leave decoder= out"),
    ],
)
def test_what_does_not_fit(sae, options, match):
    found = codes(sae, layer=1, site="resid_pre", **options)
    with pytest.raises(SweepError, match=match):
        planned(found)
    with pytest.raises(SweepError, match=match):
        plan(double(), *pairs(1, N_POS), runs=[Patch(found)], metric=METRIC)


def test_widths_that_are_said_are_compared():
    sae = at("blocks.1.hook_resid_pre")
    sae.cfg.d_in = 768
    match = "reads activations of width 768; blocks.1.hook_resid_pre of this model is 32 wide"
    with pytest.raises(SweepError, match=match):
        planned(codes(sae))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": N_FEATURES}, "features 24 is out of range: there are 24"),
        (
            {"by": ("layer", "head")},
            "cannot be swept by 'head': it is indexed by layer, pos, featu",
        ),
        ({"neurons": 3}, "neurons= was given, but resid_pre is indexed by layer, pos, feature"),
        ({"layers": [0, 1]}, "resid_pre codes has no autoencoder at layer 0: it has 1"),
        ({"window": 3}, "no autoencoder at layer 0"),
        ({"source": torch.zeros(7)}, r"\[batch, pos, feature\] = \[1, 1, 24\]"),
        ({"source": {"blocks.1.hook_resid_pre": torch.zeros(1)}}, "holds activations, no codes"),
    ],
)
def test_what_a_sweep_of_codes_refuses(options, match):
    with pytest.raises(SweepError, match=match):
        planned(codes(at("blocks.1.hook_resid_pre")), **options)


def test_what_a_patch_of_codes_refuses():
    found = codes(at("blocks.1.hook_resid_pre"))
    both = codes({0: Linear(32, 4), 1: Linear(32, 4)}, site="resid_pre")
    for patch, match in [
        (Patch(found, feature=[1, 24]), "feature 24 is out of range: there are 24"),
        (Patch(found, head=1), "head= was given, but resid_pre is indexed by pos, feature"),
        (Patch(found, 2), "no autoencoder at layer 2"),
        (Patch(both), "a Patch of resid_pre codes needs layer="),
        (Patch("z"), "a Patch of z needs layer="),
        (Patch("z", 1, feature=3), "feature= was given, but z is indexed by pos, head"),
    ]:
        with pytest.raises(SweepError, match=match):
            plan(double(), *pairs(1, N_POS), runs=[patch], metric=METRIC)
    with pytest.raises(SweepError, match="no resid_mid: attention and MLP are parallel"):
        planned(codes(Linear(32, 4), layer=1, site="resid_mid"), double("neox"))
    with pytest.raises(SweepError, match="have 4, 8 features"):
        planned(codes({0: Linear(32, 4), 1: Linear(32, 8)}, site="resid_pre"))
    with pytest.raises(SweepError, match="names a site twice"):
        planned([found, found])


def test_a_trial_finds_how_it_decodes():
    model = double()
    for kind, site, needs_input, heads in (
        (Linear, "resid_pre", False, None),
        (TopK, "attn_out", False, None),
        (Scaled, "mlp_out", True, None),
        (Heads, "z", False, 4),
        (Heads, "resid_pre", False, None),
    ):
        sae = kind(32, N_FEATURES)
        if (kind, site) == (Heads, "resid_pre"):
            sae.hook_z_reshaping_mode = False
            sae.encode, sae.decode = super(Heads, sae).encode, super(Heads, sae).decode
        one = placed(codes(sae, layer=0, site=site), 0, model)
        assert (one.needs_input, one.heads, one.matrix) == (needs_input, heads, None)
        given = codes(sae, layer=0, site=site, decoder=None if needs_input else sae.W_dec)
        assert (placed(given, 0, model).matrix is None) == needs_input


def test_evaluation_mode_and_back():
    class Dropped(Linear):
        def __init__(self):
            super().__init__(32, N_FEATURES)
            self.drop = nn.Dropout(0.5)

        def encode(self, x):
            return self.drop(super().encode(x))

    sae = Dropped()
    assert sae.drop.training
    clean, corrupted = pairs(1, N_POS)
    found = codes(sae, layer=1, site="resid_pre")
    scores = sweep(double(), clean, corrupted, sites=found, metric=METRIC, verify="all")
    assert sae.drop.training and scores.certificate["max_difference"] < 1e-12


# -- sweeps --------------------------------------------------------------------------------------


def test_a_sweep_over_features():
    model, sae = double(), at("blocks.1.hook_resid_pre")
    clean, corrupted = pairs(2, N_POS)
    scores = sweep(
        *(model, clean, corrupted),
        sites=codes(sae),
        by=("layer", "pos", "feature"),
        features=[3, -1],
        positions=[3, 4, 5],
        source=2.0,
        mode="add",
        metric=METRIC,
        verify="all",
    )
    assert scores.axes == ("layer", "pos", "feature") and scores.values.shape == (1, 3, 2)
    assert scores.labels["feature"] == ["F3", "F23"] and scores.labels["layer"] == ["L1"]
    assert scores.meta["sites"] == ["resid_pre codes"]
    assert scores.plan["strategy"] == WAVE and scores.certificate["runs"] == 6
    steered = [
        sweep(
            *(model, clean, corrupted),
            sites="resid_pre",
            layers=1,
            positions=[3, 4, 5],
            source=2.0 * sae.W_dec[feature].detach(),
            mode="add",
            metric=METRIC,
        ).values
        for feature in (3, -1)
    ]
    # Adding to a code is adding its direction, where the decoder is one matrix.
    assert_close_to(scores.values, torch.stack(steered, -1), atol=1e-12)


def test_all_features_together_and_those_outside_by():
    model, sae = double(), Linear(32, N_FEATURES)
    clean, corrupted = pairs(1, N_POS)
    found = codes(sae, layer=1, site="resid_mid")
    whole = planned(found, model).grid
    assert whole.axes == ("layer", "pos") and whole.runs[0].patches[0].columns is None
    some = planned(found, model, by="layer", features=[1, 2], positions=4).grid
    assert [run.patches[0][2:4] for run in some.runs] == [((4,), (1, 2))]
    everything, some, none = (
        sweep(model, clean, corrupted, sites=found, source="zero", metric=METRIC, **options)
        for options in ({"by": "layer"}, {"by": "layer", "features": [1, 2]}, {"positions": [0]})
    )
    assert everything.values != some.values
    assert none.values.shape == (1, 1)


def test_sites_and_codes_of_one_sweep_share_their_axes():
    model = double()
    clean, corrupted = pairs(1, N_POS)
    first = codes(Linear(32, N_FEATURES), layer=1, site="resid_pre")
    second = codes(Linear(32, N_FEATURES, 1), layer=1, site="resid_pre", name="the other")
    scores = sweep(
        model, clean, corrupted, sites=["resid_pre", first, second], layers=1, metric=METRIC
    )
    assert scores.labels["site"] == ["resid_pre", "resid_pre codes", "the other"]
    assert scores.values.shape == (3, 1, N_POS)
    assert len({round(float(value), 9) for value in scores.values[:, 0, 3]}) == 3
    with pytest.raises(SweepError, match="different heads, layers or features"):
        planned(["resid_pre", first], model)


def test_other_is_null_where_the_prompts_agree():
    query = planned(codes(Linear(32, N_FEATURES), layer=1, site="resid_pre"), double())
    reasons = [query.plan.why_not.get(number) for number in range(N_POS)]
    assert reasons == ["null", "null", None, None, None, None]
    zeroed = planned(codes(Linear(32, 4), layer=1, site="resid_pre"), double(), source="zero")
    assert not zeroed.plan.why_not


def test_resid_post_is_the_next_layers_resid_pre():
    model, sae = double(), Curved(32, N_FEATURES)
    clean, corrupted = pairs(1, N_POS)
    values = [
        sweep(model, clean, corrupted, sites=codes(sae, layer=layer, site=site), metric=METRIC,
              verify="all").values
        for layer, site in ((0, "resid_post"), (1, "resid_pre"))
    ]  # fmt: skip
    assert torch.equal(*values)


def test_a_plan_names_the_autoencoder():
    sae = at("blocks.1.attn.hook_z")
    text = str(planned(codes(sae), by=("layer", "pos", "feature")))
    assert "144 runs of z codes" in text
    assert "codes: 24 features of Linear at blocks.1.attn.hook_z, decoded whole" in text
    assert "takes no rows" in text
    text = str(planned(codes(sae, decoder=sae.W_dec)))
    assert "decoded by one matrix" in text
    query = planned(codes(sae), by=("layer", "feature"))
    assert query.grid.name(query.runs[3]) == "z codes, layer L1, feature F3"


def test_other_strategies():
    model, sae = double(), at("blocks.1.hook_resid_pre", Curved)
    clean, corrupted = pairs(2, N_POS)
    asked = {"sites": codes(sae), "by": ("layer", "pos", "feature"), "features": [1, 9]}
    by_wave = sweep(model, clean, corrupted, metric=METRIC, **asked)
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)]):
        alone = sweep(model, clean, corrupted, metric=METRIC, **asked)
    model.forward = type(model).forward.__get__(model)
    stacked = sweep(model, clean, corrupted, metric=METRIC, **asked)
    assert (alone.plan["strategy"], stacked.plan["strategy"]) == (ALONE, STACKED)
    for one in (alone, stacked):
        assert_close_to(one.values, by_wave.values, atol=1e-12)


def test_hooks_on_an_autoencoder_are_not_passed_over():
    class Hooked(Linear):
        def __init__(self):
            super().__init__(32, N_FEATURES)
            self.place = nn.Identity()

        def decode(self, c):
            return self.place(super().decode(c))

    sae = Hooked()
    found = codes(sae, layer=1, site="resid_pre", decoder=sae.W_dec)
    assert planned(found).strategy.name == WAVE
    handle = sae.place.register_forward_hook(lambda module, given, out: out)
    query = planned(found)
    assert query.strategy.name == ALONE
    assert "hooks are on place of the autoencoder at blocks.1.hook_resid_pre" in str(query)
    handle.remove()


def test_gradients_reach_codes():
    model, sae = double(), Linear(32, N_FEATURES)
    clean, corrupted = pairs(1, N_POS)
    size = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    patch = Patch(codes(sae, layer=1, site="resid_pre"), pos=-1, feature=3, source=size, mode="add")
    scores = sweep(model, clean, corrupted, runs=[patch], metric=METRIC, gradients=True)
    scores.values.sum().backward()
    direction = sae.W_dec[3].detach().clone().requires_grad_()
    added = Patch("resid_pre", 1, pos=-1, source=direction, mode="add")
    shifted = sweep(model, clean, corrupted, runs=[added], metric=METRIC, gradients=True)
    base = sweep(model, clean, corrupted, runs=[added], metric=METRIC)
    assert float(size.grad) != 0.0
    assert_close_to(shifted.values.detach(), base.values, atol=1e-12)


def test_a_float32_autoencoder_of_a_float64_model():
    model, sae = double(), Curved(32, N_FEATURES).float()
    clean, corrupted = pairs(1, N_POS)
    scores = sweep(
        *(model, clean, corrupted),
        sites=codes(sae, layer=1, site="resid_pre"),
        metric=METRIC,
        verify="all",
    )
    assert scores.certificate["tolerance"] >= 1e-4 and scores.values.dtype == torch.float64


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_knows_the_autoencoder(tmp_path):
    model = double()
    clean, corrupted = pairs(2, N_POS)

    def run(sae, **options):
        found = codes(sae, layer=1, site="resid_pre")
        return sweep(
            *(model, clean, corrupted),
            sites=found,
            by=("layer", "pos", "feature"),
            metric=METRIC,
            out=tmp_path / "sweep",
            **options,
        )

    first = run(TopK(32, N_FEATURES))
    again = run(TopK(32, N_FEATURES))
    assert torch.equal(first.values, again.values)
    with pytest.raises(SourceError):
        run(TopK(32, N_FEATURES, seed=1))
    with pytest.raises(SourceError):
        run(Linear(32, N_FEATURES))


def test_one_without_weights_is_known_by_what_it_does(tmp_path):
    class Signs:
        def __init__(self, scale):
            self.scale = scale

        def encode(self, x):
            return torch.cat([x.relu(), (-x).relu()], -1) * self.scale

        def decode(self, c):
            return (c[..., :32] - c[..., 32:]) / self.scale

    clean, corrupted = pairs(1, N_POS)
    found = [codes(Signs(scale), layer=1, site="resid_pre") for scale in (2.0, 3.0)]
    asked = {"metric": METRIC, "out": tmp_path / "sweep", "verify": "all"}
    first = sweep(double(), clean, corrupted, sites=found[0], **asked)
    # It loses nothing, so patching all its codes is patching the activation.
    plain = sweep(double(), clean, corrupted, sites="resid_pre", layers=1, metric=METRIC)
    assert_close_to(first.values, plain.values, atol=1e-12)
    with pytest.raises(SourceError):
        sweep(double(), clean, corrupted, sites=found[1], **asked)


def test_a_sweep_goes_on_after_a_kill(tmp_path, monkeypatch):
    from fastlens.patching.folder import SweepFolder

    model, sae = double(), Linear(32, N_FEATURES)
    clean, corrupted = pairs(2, N_POS)
    found = codes(sae, layer=0, site="resid_pre", decoder=sae.W_dec)
    asked = {"sites": found, "by": ("layer", "pos", "feature"), "metric": METRIC, "verify": 0}
    query = plan(model, clean, corrupted, **{k: asked[k] for k in ("sites", "by", "metric")})
    least = memory_for_rows(query.plan, 40)
    whole = sweep(model, clean, corrupted, **asked, memory=least, out=tmp_path / "whole")
    assert whole.plan["chunks"] > 3
    write, written = SweepFolder.write, []

    def dying(self, at, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(at)
        write(self, at, tensors)

    monkeypatch.setattr(SweepFolder, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, clean, corrupted, **asked, memory=least, out=tmp_path / "cut")
    monkeypatch.setattr(SweepFolder, "write", write)
    resumed = sweep(model, clean, corrupted, **asked, memory=least, out=tmp_path / "cut")
    assert torch.equal(resumed.values, whole.values)
