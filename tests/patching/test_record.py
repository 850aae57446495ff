"""What a folder knows a sweep by: everything its values depend on, nothing else."""

import pytest
import torch

from fastlens.errors import SourceError
from fastlens.patching import Patch, kl_divergence, logit_diff, plan
from fastlens.patching.record import key_of, layout_of, plan_from_layout
from tests.models import ours, prompts
from tests.patching.budgets import memory_for_rows

METRIC = logit_diff(7, 3)


def pair():
    clean = prompts(2, 5)
    corrupted = clean.clone()
    corrupted[:, 1] = (corrupted[:, 1] + 7) % 50
    return clean, corrupted


def key(model=None, clean=None, corrupted=None, **options):
    tokens = pair()
    query = plan(
        model or ours("gpt2"),
        tokens[0] if clean is None else clean,
        tokens[1] if corrupted is None else corrupted,
        **{"metric": METRIC, **options},
    )
    return key_of(query)


def test_what_the_values_depend_on_is_in_the_key():
    base = key()
    assert key() == base
    clean, corrupted = pair()
    vector = torch.ones(32)
    other_tokens = clean.clone()
    other_tokens[0, 0] += 1
    changed = ours("gpt2")
    with torch.no_grad():
        changed.blocks[1].attn.W_O[0, 0, 0] += 1e-3
    mask = torch.ones_like(clean)
    mask[:, 0] = 0
    changes = {
        "clean": key(clean=other_tokens),
        "corrupted": key(corrupted=other_tokens),
        "mask": key(attention_mask=mask),
        "direction": key(direction="noising"),
        "sites": key(sites="attn_out"),
        "layers": key(layers=[0, 1]),
        "window": key(window=2),
        "mode": key(mode="add"),
        "zero": key(source="zero"),
        "number": key(source=0.5),
        "tensor": key(source=vector),
        "another tensor": key(source=vector * (1 + 1e-6)),
        "seed": key(source="resample", seed=0),
        "cache": key(runs=[Patch("z", 0, source={"blocks.0.attn.hook_z": torch.ones(2, 5, 4, 8)})]),
        "answers": key(metric=logit_diff(7, 4)),
        "position": key(metric=logit_diff(7, 3, position=2)),
        "metric": key(metric=kl_divergence()),
        "function": key(metric=lambda logits: logits[:, -1, 3]),
        "another function": key(metric=lambda logits: logits[:, -1, 4]),
        "normalize": key(normalize=True),
        "weights": key(model=changed),
        "dtype": key(model=ours("gpt2", dtype=torch.float64)),
        "model": key(model=ours("llama")),
    }
    listed = [base, *changes.values()]
    same = [name for i, name in enumerate(changes, 1) if listed[i] in listed[:i]]
    assert not same, f"these change the scores and not the key: {same}"


def test_memory_is_not_in_the_key_and_the_layout_wins():
    model, (clean, corrupted) = ours("gpt2"), pair()
    roomy = plan(model, clean, corrupted, metric=METRIC, memory="1GiB")
    memory = memory_for_rows(roomy.plan, 10)
    tight = plan(model, clean, corrupted, metric=METRIC, memory=memory)
    assert key_of(roomy) == key_of(tight)
    assert len(tight.plan.chunks) > 1 == len(roomy.plan.chunks)
    again = plan_from_layout(roomy, layout_of(tight))
    assert again.plan.chunks == tight.plan.chunks
    assert again.summary() == tight.summary()


def test_a_layout_of_other_runs_is_refused():
    model, (clean, corrupted) = ours("gpt2"), pair()
    query = plan(model, clean, corrupted, metric=METRIC)
    layout = layout_of(query)
    with pytest.raises(SourceError, match="planned by another version"):
        plan_from_layout(query, {**layout, "chunks": [layout["chunks"][0][1:]]})
    with pytest.raises(SourceError, match="begun as 'stacked forwards', and now it would run as"):
        plan_from_layout(query, {**layout, "strategy": "stacked forwards"})
