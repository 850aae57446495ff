"""One test for each trap of a planned sweep, each against hooked runs and a fact of its own."""

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from fastlens.components.norms import RMSNormPre
from fastlens.errors import MetricError, SweepError
from fastlens.patching import Patch, execute, logit_diff, plan, sweep
from fastlens.patching.plan import MLP
from fastlens.patching.strategy import ALONE, LAYER_SKIP, STACKED, WAVE, strategy_of
from tests.models import ours
from tests.patching.against_hooks import (
    check,
    every_activation,
    hooked_logits,
    mask_of,
    mixed_runs,
    pairs,
    planned,
    wave_logits,
)

N_POS = 6
METRIC = logit_diff(7, 3)


def double(name, **changes):
    return ours(name, dtype=torch.float64, **changes)


def logits_of(model, runs, batch=2, n_pos=N_POS, **options):
    """Checked logits ``[run, batch, needed, d_vocab]``."""
    clean, corrupted = pairs(batch, n_pos)
    return check(planned(model, clean, corrupted, runs, **options))


def furthest(a, b):
    return float((a - b).detach().abs().max())


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- what a site touches, by type of block -------------------------------------------------------


def test_sequential_attention_reaches_the_mlp_of_its_layer():
    model = double("gpt2", n_layers=1)
    patch = Patch("attn_out", 0, pos=-1, source=noise(32))
    patched, unseen = logits_of(model, [[patch], [patch, Patch("mlp_out", 0, pos=-1, source=0.0)]])
    clean, corrupted = pairs(2, N_POS)
    query = planned(model, clean, corrupted, [patch])
    assert query.plan.counts[0, MLP] == 2
    assert furthest(patched, unseen) > 1e-3


def test_parallel_attention_does_not_reach_the_mlp_of_its_layer():
    model = double("neox", n_layers=1)
    clean, corrupted = pairs(2, N_POS)
    patch = Patch("attn_out", 0, pos=-1, source=noise(32))
    query = planned(model, clean, corrupted, [patch])
    assert query.plan.counts[0, MLP] == 0
    _, cache = model.run_with_cache(corrupted, names_filter="blocks.0.hook_mlp_out")
    kept = [patch, Patch("mlp_out", 0, source=dict(cache))]
    with_base_mlp, patched = logits_of(model, [kept, [patch]])
    assert furthest(with_base_mlp, patched) <= 1e-12
    with pytest.raises(SweepError, match="parallel"):
        planned(model, clean, corrupted, [Patch("resid_mid", 0)])


def test_post_norm_takes_no_shortcut_through_heads():
    """Norms behind attention make the effects of two heads another sum than that of both."""
    model = double("post_norm")
    heads = [Patch("z", 0, head=head, pos=-1, source=noise(8)) for head in (0, 1)]
    base, first, second, both = logits_of(
        model, [[Patch("z", 0, pos=0)], heads[:1], heads[1:], heads]
    )
    assert furthest(first + second - base, both) > 1e-4


def test_attention_only_blocks():
    model = double("attn_only")
    clean, corrupted = pairs(2, N_POS)
    query = planned(model, clean, corrupted, [Patch("z", 0, pos=3), Patch("resid_post", 1)])
    assert not query.plan.counts[:, MLP].any()
    check(query)
    for site in ("mlp_out", "resid_mid"):
        with pytest.raises(SweepError, match="attention only"):
            planned(model, clean, corrupted, [Patch(site, 0)])


# -- queries, keys and values --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_a_patch_sends_tokens_to_other_experts(name):
    """Rows are routed anew behind a patch, alone or beside others; no site lies in the experts."""
    model = double(name)
    patch = Patch("resid_pre", 1, pos=2, source=noise(32))
    clean, corrupted = pairs(2, N_POS)

    def chosen(hooks):
        seen = {}

        def keep(value, hook):
            seen["experts"] = value

        name = "blocks.1.mlp.hook_expert_indices"
        model.run_with_hooks(corrupted, fwd_hooks=[*hooks, (name, keep)])
        return seen["experts"].view(2, N_POS, -1)

    def put(resid, hook):
        resid[:, 2] = noise(32)
        return resid

    before, after = chosen([]), chosen([("blocks.1.hook_resid_pre", put)])
    assert not torch.equal(before[:, 2], after[:, 2])
    assert torch.equal(before[:, :2], after[:, :2])
    logits_of(model, [[patch], [patch, Patch("mlp_out", 1, pos=2, source=0.0)]])
    with pytest.raises(SweepError, match="each of which sees other tokens"):
        planned(model, clean, corrupted, [Patch("mlp_post", 1)])


def test_dense_layers_before_mixtures_have_neurons_of_their_own():
    model = double("moe", n_dense_layers=1, d_mlp_dense=48)
    for options in ({"neurons": [1, 30, 47]}, {"source": noise(48)}):
        by = ("layer", "neuron") if "neurons" in options else ("layer", "pos")
        scores = sweep(model, *pairs(2, N_POS), sites="mlp_post", layers=[0], by=by,
                       metric=METRIC, verify="all", **options)  # fmt: skip
        assert scores.plan["strategy"] == WAVE
    _, cache = model.run_with_cache(pairs(2, N_POS)[0])
    stack, labels = cache.stack_neuron_results(1, return_labels=True)
    assert len(stack) == len(labels) == 48


def test_queries_and_keys_are_patched_before_qk_norm():
    """A factor on all of q is what the norm takes out again; behind it, it is not."""
    model = double("qk_norm", eps=1e-12)
    base, before, before_keys, behind, behind_keys = logits_of(
        model,
        [
            Patch("z", 0, pos=0),
            Patch("q", 1, source=3.0, mode="scale"),
            Patch("k", 1, source=3.0, mode="scale"),
            Patch("rot_q", 1, source=3.0, mode="scale"),
            Patch("rot_k", 1, source=3.0, mode="scale"),
        ],
    )
    assert max(furthest(base, before), furthest(base, before_keys)) < 1e-7
    assert min(furthest(base, behind), furthest(base, behind_keys)) > 1e-5


@pytest.mark.parametrize("name", ["llama", "neox", "rotary_adjacent"])
def test_patched_queries_and_keys_are_rotated_with_the_receiving_position(name):
    """One vector put in as the key of two positions gives two rotated keys."""
    model = double(name)
    d_head = model.cfg.d_head
    cache = {}
    clean, corrupted = pairs(2, N_POS)
    for site in ("q", "k"):
        value = noise(d_head)
        hook = f"blocks.1.attn.hook_{site}"

        def put(activation, hook, value=value):
            activation[:, [2, 4]] = value
            return activation

        with model.hooks(fwd_hooks=[(hook, put)]), torch.no_grad():
            _, seen = model.run_with_cache(corrupted, names_filter=f"blocks.1.attn.hook_rot_{site}")
        rotated = seen[f"blocks.1.attn.hook_rot_{site}"]
        assert furthest(rotated[:, 2], rotated[:, 4]) > 1e-2
        cache[f"blocks.1.attn.hook_rot_{site}"] = rotated
        before = Patch(site, 1, pos=[2, 4], source=value)
        behind = Patch(f"rot_{site}", 1, pos=[2, 4], source=dict(cache))
        one, two = logits_of(model, [before, behind])
        assert furthest(one, two) <= 1e-12


@pytest.mark.parametrize("site", ["k", "v", "rot_k", "k_input", "v_input"])
def test_a_kv_head_moves_its_group_of_query_heads(site):
    model = double("llama")
    clean, corrupted = pairs(2, N_POS)
    _, base = model.run_with_cache(corrupted, names_filter="blocks.1.attn.hook_z")
    base = dict(base)

    def run(heads):
        width = 32 if site.endswith("input") else 8
        patch = Patch(site, 1, head=1, pos=3, source=noise(width))
        return [patch, *(Patch("z", 1, head=head, source=base) for head in heads)]

    none, group, half, others = logits_of(model, [run([]), run([2, 3]), run([2]), run([0, 1])])
    unpatched = model(corrupted)[:, -1:]
    assert furthest(group, unpatched) <= 1e-12
    assert furthest(others, none) <= 1e-12
    assert min(furthest(half, unpatched), furthest(half, none)) > 1e-6
    with pytest.raises(SweepError, match="head 2 is out of range"):
        planned(model, clean, corrupted, [Patch(site, 1, head=2)])


# -- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "softcap", "local"])
def test_patched_pattern_rows_are_not_renormalised(name):
    model = double(name)
    half, of_z, scores = logits_of(
        model,
        [
            Patch("pattern", 1, pos=[3, 5], head=1, source=0.5, mode="scale"),
            Patch("z", 1, pos=[3, 5], head=1, source=0.5, mode="scale"),
            Patch("attn_scores", 1, pos=[3, 5], head=1, source=0.5, mode="add"),
        ],
    )
    assert furthest(half, of_z) <= 1e-12
    # Scores are: a shift of a whole row is what softmax takes out again.
    assert furthest(scores, model(pairs(2, N_POS)[1])[:, -1:]) <= 1e-12


def test_a_patched_pattern_weighs_the_runs_own_values():
    model = double("llama")
    clean, corrupted = pairs(2, N_POS)
    names = [f"blocks.1.attn.hook_{name}" for name in ("pattern", "z", "v")]
    _, base = model.run_with_cache(corrupted, names_filter=names)
    value = noise(8)
    v = base["blocks.1.attn.hook_v"].clone()
    v[:, 3, 1] = value
    pattern = base["blocks.1.attn.hook_pattern"]
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, 2))
    keys_too = Patch("resid_pre", 1, pos=4, source=noise(32), mode="add")
    own = Patch("v", 1, head=1, pos=3, source=value)
    frozen, by_hand, stale = logits_of(
        model,
        [
            [own, Patch("pattern", 1, source=dict(base))],
            [Patch("z", 1, source={"blocks.1.attn.hook_z": z})],
            [own, Patch("z", 1, source=dict(base))],
        ],
    )
    assert furthest(frozen, by_hand) <= 1e-12
    assert furthest(frozen, stale) > 1e-5
    logits_of(model, [[keys_too, own, Patch("pattern", 1, source=dict(base))]])


# -- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "alibi", "gpt2", "shortformer", "llama"])
def test_positions_are_absolute_never_packed(name):
    """Single late rows, far apart: their packed places say nothing of where they stand."""
    model = double(name)
    runs = [
        Patch(site, layer, pos=pos, source=source)
        for site in ("resid_pre", "k", "q", "v", "pattern")
        for layer in range(2)
        for pos, source in (([5, 9], "other"), (7, 0.5), ([2, 8, 10], "zero"))
    ]
    logits = logits_of(model, runs, n_pos=11, reads=(-3, -1))
    base = model(pairs(2, 11)[1])[:, [-3, -1]]
    changed = [furthest(one, base) > 1e-7 for one in logits]
    # What a window hides from both rows that are read changes nothing.
    assert sum(changed) > len(runs) // 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "alibi", "shortformer", "local"])
def test_left_padding_shifts_each_example_by_its_own(name):
    model = double(name)
    clean, corrupted = pairs(3, 8)
    mask = mask_of("left", 3, 8)
    patches = [("resid_pre", 0, 3, "other"), ("k", 1, 4, 0.3), ("z", 1, 5, "other")]
    padded = planned(
        *(model, clean, corrupted, [Patch(s, la, pos=p, source=v) for s, la, p, v in patches]),
        mask=mask,
    )
    together = check(padded)
    for example in range(3):
        n = int((mask[example] == 0).sum())
        rows = slice(example, example + 1)
        alone = planned(
            *(model, clean[rows, n:], corrupted[rows, n:]),
            [Patch(s, la, pos=p - n, source=v) for s, la, p, v in patches],
        )
        assert furthest(wave_logits(alone), together[:, rows]) <= 1e-12


# -- null and dead runs --------------------------------------------------------------------------


def test_only_the_other_prompts_values_at_the_same_place_are_null():
    model = double("gpt2")
    clean, corrupted = pairs(1, N_POS)
    before = {"pos": [0, 1]}
    live = {
        "zero": Patch("z", 0, **before, source="zero"),
        "mean": Patch("z", 0, **before, source="mean"),
        "number": Patch("z", 0, **before, source=0.1),
        "tensor": Patch("z", 0, **before, source=noise(8)),
        "add": Patch("z", 0, **before, mode="add"),
        "scale": Patch("z", 0, **before, mode="scale"),
        "beside a live one": [Patch("resid_pre", 0, pos=0, source="zero"), Patch("z", 1, **before)],
        "behind a live one": [Patch("z", 0, pos=0, source="zero"), Patch("z", 1, pos=1)],
        "reaching further": Patch("z", 0, pos=[0, 2]),
    }
    null = {
        "null": Patch("z", 0, **before),
        "both": [Patch("z", 0, **before), Patch("k", 1, pos=1)],
        "keys nobody sees": Patch("pattern", 0, key_pos=5, pos=[2, 3, 4]),
    }
    query = planned(model, clean, corrupted, {**live, **null})
    found = [query.plan.why_not.get(number) for number in range(len(query.runs))]
    assert found == [None] * len(live) + ["null"] * len(null)
    check(query)


def test_a_null_patch_undoes_a_live_one():
    """Null is what the base run has there, not what the run has."""
    model = double("gpt2")
    live = Patch("z", 0, pos=1, source=noise(8))
    undone, live_alone = logits_of(model, [[live, Patch("attn_out", 0, pos=1)], [live]])
    base = model(pairs(2, N_POS)[1])[:, -1:]
    assert furthest(undone, base) <= 1e-12 < 1e-6 < furthest(live_alone, base)


def test_with_a_bidirectional_model_no_prefix_is_untouched():
    model = double("bidirectional")
    clean, corrupted = pairs(1, N_POS)
    query = planned(model, clean, corrupted, [Patch("resid_pre", 1, pos=0), Patch("k", 1, pos=1)])
    assert query.strategy.name == LAYER_SKIP and not query.plan.why_not
    logits = check(query)
    assert min(furthest(one, model(corrupted)[:, -1:]) for one in logits) > 1e-7


# -- several patches in one run ------------------------------------------------------------------


def test_the_order_inside_a_layer_is_the_forwards():
    model = double("gpt2")
    names = ("resid_pre", "q", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
    patches = [Patch(site, 1, pos=3, source=0.9, mode="scale") for site in names]
    one, two = logits_of(model, [patches, patches[::-1]])
    assert torch.equal(one, two)
    # What comes later in the forward wins, wherever it stands in the list.
    zero_first, only = logits_of(
        model,
        [
            [Patch("resid_mid", 1, pos=3), Patch("attn_out", 1, pos=3, source=noise(32))],
            [Patch("resid_mid", 1, pos=3)],
        ],
    )
    assert furthest(zero_first, only) <= 1e-12


def test_add_and_scale_act_on_what_the_run_holds():
    model = double("gpt2")
    value = noise(32)
    base, twice, doubled, cancelled, scaled = logits_of(
        model,
        [
            [Patch("resid_pre", 0, pos=0)],
            [Patch("resid_pre", 1, pos=3, source=value, mode="add")] * 2,
            [Patch("resid_pre", 1, pos=3, source=2 * value, mode="add")],
            [
                Patch("resid_pre", 1, pos=3, source=value, mode="add"),
                Patch("resid_pre", 1, pos=3, source=-value, mode="add"),
            ],
            [
                Patch("resid_pre", 1, pos=3, source=value),
                Patch("resid_pre", 1, pos=3, source=2.0, mode="scale"),
            ],
        ],
    )
    assert furthest(twice, doubled) <= 1e-12 and furthest(cancelled, base) <= 1e-12
    (replaced,) = logits_of(model, [Patch("resid_pre", 1, pos=3, source=2 * value)])
    assert furthest(scaled, replaced) <= 1e-12


def test_a_later_patch_at_an_earlier_position_brings_base_rows_in():
    model = double("llama")
    late = Patch("resid_pre", 0, pos=4)
    for layer, pos in ((1, 1), (2, 0), (1, [0, 2])):
        early = Patch("resid_pre", layer, pos=pos, source=noise(32), mode="add")
        both, alone = logits_of(model, [[late, early], [early]])
        assert furthest(both, alone) > 1e-7
        row_only = Patch("mlp_post", layer, pos=pos, source=0.5)
        logits_of(model, [[late, row_only], [row_only, late, Patch("q", 2, pos=-1)]])


# -- prompts -------------------------------------------------------------------------------------


def test_noising_swaps_base_and_source():
    model = double("gpt2")
    clean, corrupted = pairs(2, N_POS)
    runs = [Patch("resid_pre", 1, pos=3), Patch("z", 1), Patch("mlp_out", 0, pos=[2, 4])]
    noising = planned(model, clean, corrupted, runs, direction="noising")
    swapped = planned(model, corrupted, clean, runs)
    assert torch.equal(wave_logits(noising), wave_logits(swapped))
    check(noising)
    with pytest.raises(MetricError, match="fractions of their gap mean nothing"):
        sweep(model, clean, clean, runs=runs, metric=logit_diff(7, 3, normalize=True))


def test_pairs_have_each_their_own_first_difference():
    model = double("gpt2")
    clean, corrupted = pairs(3, N_POS)
    runs = [Patch("resid_pre", 1, pos=pos) for pos in range(N_POS)]
    query = planned(model, clean, corrupted, runs)
    assert query.plan.frame.first_difference == (2, 3, 4)
    assert [number for number in range(N_POS) if number in query.plan.why_not] == [0, 1]
    logits = check(query)
    base = model(corrupted)[:, -1:]
    for pos in range(N_POS):
        for example, first in enumerate((2, 3, 4)):
            same = furthest(logits[pos, example], base[example]) <= 1e-12
            assert same == (pos < first), (pos, example)


def test_one_call_of_a_metric_sees_all_examples_of_one_run():
    """Also those whose pair is untouched by the run's patches."""
    model = double("gpt2")
    clean, corrupted = pairs(3, N_POS)
    runs = [Patch("resid_pre", 1, pos=3)]
    scores = sweep(
        model, clean, corrupted, runs=runs, metric=lambda x: (x[:, -1, 5]).prod(), verify="all"
    )
    expected = hooked_logits(planned(model, clean, corrupted, runs))[0, :, 0, 5].prod()
    assert abs(float(scores.values[0] - expected)) <= 1e-12


# -- the model is left alone ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "neox", "post_norm", "solu_ln", "moe", "gpt_oss"]
)
def test_the_wave_calls_no_module(name, monkeypatch):
    """Packed rows reach no HookPoint, nor any module at all."""
    model = double(name)
    clean, corrupted = pairs(2, N_POS)
    runs = mixed_runs(model, 2, N_POS, every_activation(model, 2, N_POS))
    query = planned(model, clean, corrupted, runs)
    expected = execute(query, verify=False).values

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{type(self).__name__} was called")

    monkeypatch.setattr(nn.Module, "__call__", refuse)
    monkeypatch.setattr(nn.Module, "_call_impl", refuse)
    with pytest.raises(AssertionError, match="was called"):
        model(corrupted)
    assert torch.equal(execute(query, verify=False).values, expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_grad_mode_training_mode_weights_flags_and_hooks_are_left_alone(grad, fails):
    model = double("gpt2")
    model.train()
    model.blocks[1].eval()
    cfg = model.cfg.to_dict()
    weights = {name: leaf.clone() for name, leaf in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    clean, corrupted = pairs(2, N_POS)
    seen = []

    def metric(logits):
        seen.append(torch.is_grad_enabled())
        if fails and float(logits[0, -1, 0].abs()) > 0:
            raise KeyboardInterrupt
        return logits[:, -1, 0]

    with torch.set_grad_enabled(grad):
        try:
            sites = ["resid_pre", "q_input", "attn_in", "result", "mlp_in"]
            scores = sweep(model, clean, corrupted, sites=sites, by="layer", metric=metric)
            assert not fails and not scores.values.requires_grad
        except KeyboardInterrupt:
            assert fails
        assert torch.is_grad_enabled() == grad and not torch.is_inference_mode_enabled()
    assert not any(seen[1:]), "beyond finding out what it reads, no graph is kept"
    assert [module.training for module in model.modules()] == modes
    assert model.cfg.to_dict() == cfg
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, leaf in model.named_parameters():
        assert torch.equal(leaf, weights[name]) and leaf.requires_grad and leaf.grad is None


# -- what is live or foreign is never passed by --------------------------------------------------


def scores_of(model, **options):
    clean, corrupted = pairs(2, N_POS)
    options = {"sites": "resid_pre", "metric": METRIC, "verify": False, **options}
    return sweep(model, clean, corrupted, **options)


def by_hand(model, site="resid_pre"):
    """The same sweep as a loop of hooked runs, hooks of the user's included."""
    clean, corrupted = pairs(2, N_POS)
    rows = []
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            name = f"blocks.{layer}.hook_{site}"
            _, source = model.run_with_cache(clean, names_filter=name)
            for pos in range(N_POS):

                def put(activation, hook, pos=pos, value=source[name]):
                    activation = activation.clone()
                    activation[:, pos] = value[:, pos]
                    return activation

                rows.append(METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(name, put)])))
    return torch.stack(rows).mean(1).view(model.cfg.n_layers, N_POS)


def assert_by_hand(model, strategy):
    plain = scores_of(double("gpt2")).values
    scores = scores_of(model)
    assert scores.plan["strategy"] == strategy, scores.plan
    assert furthest(scores.values, by_hand(model)) <= 1e-12
    assert furthest(scores.values, plain) > 1e-6, "what was changed must show"
    assert strategy_of(model).name == strategy


def test_a_live_hook_acts_in_every_run():
    model = double("gpt2")
    called = []

    def halve(activation, hook):
        called.append(hook.name)
        return activation * 0.5

    model.add_hook("blocks.1.hook_mlp_out", halve)
    assert_by_hand(model, ALONE)
    assert len(called) > 3 * N_POS
    model.reset_hooks()
    assert strategy_of(model).name == WAVE


def test_a_native_torch_hook_acts_too():
    model = double("gpt2")
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    assert_by_hand(model, ALONE)
    handle.remove()
    assert strategy_of(model).name == WAVE


class Half(nn.Module):
    """Something of a user's."""

    def __init__(self, inside=None):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return 0.5 * (x if self.inside is None else self.inside(x))


def foreign_mlp(model):
    model.blocks[1].mlp = Half(model.blocks[1].mlp)


def foreign_hook_point(model):
    model.blocks[1].hook_mlp_out = Half()


def overwritten_forward(model):
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x, forward=mlp.forward: 0.5 * forward(x)


def overwritten_hook_point(model):
    model.blocks[1].attn.hook_z.forward = lambda x: 0.5 * x


def identity_for_mlp(model):
    model.blocks[1].mlp = nn.Identity()


def foreign_norm(model):
    model.blocks[1].ln2 = RMSNormPre(model.cfg)
    model.blocks[1].ln1 = Half(model.blocks[1].ln1)


def foreign_inside_a_parametrized_part(model):
    parametrize.register_parametrization(model.blocks[1].attn, "b_O", Half())
    model.blocks[1].attn.hook_z = Half()


@pytest.mark.parametrize(
    "change",
    [
        *(foreign_mlp, foreign_hook_point, overwritten_forward, overwritten_hook_point),
        *(identity_for_mlp, foreign_norm, foreign_inside_a_parametrized_part),
    ],
)
def test_a_foreign_part_is_run_as_it_is(change):
    model = double("gpt2")
    change(model)
    assert_by_hand(model, STACKED)


def test_a_parametrized_leaf_is_read_through_its_parametrization():
    model = double("gpt2")
    parametrize.register_parametrization(model.blocks[1].attn, "W_O", Half())
    assert_by_hand(model, WAVE)


def test_blocks_that_are_one_module_are_passed_twice_by_a_hook():
    model = double("gpt2")
    model.blocks[1] = model.blocks[0]
    model.setup()
    clean, corrupted = pairs(2, N_POS)
    query = plan(model, clean, corrupted, layers=[0, 2], metric=METRIC)
    assert query.strategy.name == ALONE and "are one module" in query.explain()
    rows = execute(query, verify=False).values
    expected = by_hand_of_shared(model, clean, corrupted)
    assert furthest(rows[0], expected) <= 1e-12


def by_hand_of_shared(model, clean, corrupted):
    name = "blocks.0.hook_resid_pre"
    with torch.no_grad():
        _, source = model.run_with_cache(clean, names_filter=name)
        rows = []
        for pos in range(N_POS):

            def put(activation, hook, pos=pos):
                activation = activation.clone()
                activation[:, pos] = source[name][:, pos]
                return activation

            rows.append(METRIC(model.run_with_hooks(corrupted, fwd_hooks=[(name, put)])).mean())
    return torch.stack(rows)


def test_gradients_that_are_asked_for():
    model = double("gpt2")
    direction = noise(32).requires_grad_()
    runs = [Patch("resid_pre", 1, pos=3, source=direction, mode="add")]
    clean, corrupted = pairs(1, N_POS)
    options = {"runs": runs, "metric": METRIC, "verify": False}
    assert not sweep(model, clean, corrupted, **options).values.requires_grad
    query = plan(model, clean, corrupted, runs=runs, metric=METRIC, gradients=True)
    assert query.strategy.name == ALONE


FLAGS = {
    "gpt2": ("use_split_qkv_input", "use_attn_in", "use_attn_result", "use_hook_mlp_in"),
    "llama": (
        *("ungroup_grouped_query_attention", "use_split_qkv_input", "use_attn_result"),
        "use_hook_mlp_in",
    ),
    "neox": ("use_split_qkv_input", "use_attn_result"),
}


@pytest.mark.parametrize(("name", "flag"), [(n, flag) for n in FLAGS for flag in FLAGS[n]])
def test_flags_change_nothing_and_stay_on(name, flag):
    model = double(name)
    sites = ("resid_pre", "q", "k", "v", "pattern", "z", "result", "mlp_out")
    runs = [Patch(site, 1, pos=pos) for site in sites for pos in (3, None)]
    heads = [Patch(site, 1, head=1, source=0.3) for site in ("q", "k", "v", "z", "result")]
    without = logits_of(model, [*runs, *heads])
    getattr(model, f"set_{flag}")(True)
    assert getattr(model.cfg, flag)
    clean, corrupted = pairs(2, N_POS)
    query = planned(model, clean, corrupted, [*runs, *heads])
    assert query.strategy.name == WAVE
    with_flag = check(query)
    assert getattr(model.cfg, flag)
    same = len(runs)
    if flag != "ungroup_grouped_query_attention":
        # There a head of k is no KV head any more: another site by the same name.
        same += len(heads)
    assert furthest(without[:same], with_flag[:same]) <= 1e-12


def test_ungrouped_kv_heads_are_query_heads():
    model = double("llama")
    model.set_ungroup_grouped_query_attention(True)
    clean, corrupted = pairs(2, N_POS)
    _, base = model.run_with_cache(corrupted, names_filter="blocks.1.attn.hook_z")
    patch = Patch("v", 1, head=3, pos=3, source=noise(8))
    one, undone = logits_of(model, [[patch], [patch, Patch("z", 1, head=3, source=dict(base))]])
    unpatched = model(corrupted)[:, -1:]
    assert furthest(undone, unpatched) <= 1e-12 < 1e-6 < furthest(one, unpatched)
