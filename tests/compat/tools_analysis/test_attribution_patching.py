"""TransformerLens' attribution patching: its values, gradients, and what it converges to."""

import pytest
import torch

from fastlens.compat.tools_analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    GradientCache,
    Node,
    attribution_patch,
    cache_activation_and_gradient,
    enumerate_nodes,
)
from fastlens.patching import logit_diff, sweep
from tests.close import assert_close_to
from tests.models import ours, prompts, theirs

_PATH = "transformer_lens.tools.analysis.attribution_patching."
# What tests here compare with TransformerLens 3.9, on equal weights.
COMPARED = [
    _PATH + name
    for name in (
        "AttributionResult",
        "AttributionResult.top_edges",
        "AttributionResult.top_nodes",
        "EdgeAttributionConfig",
        "GradientCache",
        "Node",
        "Node.hook_name",
        "attribution_patch",
        "cache_activation_and_gradient",
        "enumerate_nodes",
    )
]


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


@pytest.fixture
def tl():
    pytest.importorskip("transformer_lens")
    from transformer_lens.tools.analysis import attribution_patching

    return attribution_patching


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_values_are_those_of_transformer_lens(name, tl):
    a, b = theirs(name), ours(name)
    b.load_state_dict(a.state_dict())
    clean, corrupted = prompts(2, 6), prompts(2, 6, 1)
    want = tl.attribution_patch(a, clean, corrupted, metric, tl.EdgeAttributionConfig())
    got = attribution_patch(b, clean, corrupted, metric, EdgeAttributionConfig())
    keys = [(n.kind, n.position, n.layer, n.head, n.hook_name) for n in want.node_scores]
    assert [(n.kind, n.position, n.layer, n.head, n.hook_name) for n in got.node_scores] == keys
    assert_close_to(list(got.node_scores.values()), list(want.node_scores.values()), atol=1e-5)
    strongest = [(n.hook_name, n.position) for n, _ in want.top_nodes(3)]
    assert [(n.hook_name, n.position) for n, _ in got.top_nodes(3)] == strongest
    assert got.edge_scores == want.edge_scores == {}
    for result in (got, want):
        with pytest.raises(NotImplementedError):
            result.top_edges()

    filters = (
        None,
        "blocks.1.hook_resid_pre",
        ["hook_embed"],
        lambda name: name.endswith("attn.hook_q"),
    )
    for names_filter in filters:
        theirs_cache, our_cache = (
            library.cache_activation_and_gradient(model, corrupted, metric, names_filter)
            for library, model in ((tl, a), (_us(), b))
        )
        assert list(our_cache.activations) == list(theirs_cache.activations)
        assert_close_to(our_cache.metric, theirs_cache.metric, atol=1e-5)
        for key, value in theirs_cache.activations.items():
            assert_close_to(our_cache.activations[key], value, atol=1e-5)
            assert_close_to(our_cache.gradients[key], theirs_cache.gradients[key], atol=1e-5)
        assert not any(p.grad is not None for p in b.parameters())


def _us():
    from fastlens.compat.tools_analysis import attribution_patching

    return attribution_patching


@pytest.mark.tl
def test_configs_and_nodes_refuse_what_transformer_lens_refuses(tl):
    assert EdgeAttributionConfig() == EdgeAttributionConfig("node", 1)
    for library in (tl, _us()):
        for arguments, error in (
            ({"granularity": "edge"}, NotImplementedError),
            ({"ig_steps": 5}, NotImplementedError),
            ({"ig_steps": 0}, ValueError),
        ):
            with pytest.raises(error):
                library.EdgeAttributionConfig(**arguments)
        for arguments in (
            {"kind": "embed", "layer": 0},
            {"kind": "attn_head_out", "layer": 0},
            {"kind": "mlp_out", "layer": 0, "head": 1},
            {"kind": "mlp_out"},
        ):
            with pytest.raises(ValueError):
                library.Node(position=0, **arguments)


def test_to_first_order_it_is_patching():
    """Prompts that hardly differ: embeddings of the corrupted ones near the clean ones'."""
    model = ours("gpt2", dtype=torch.float64)
    clean, corrupted = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[4, 8, 6, 7]])
    with torch.no_grad():
        model.W_E[8] = model.W_E[5] + 1e-4 * model.W_E[8]
    scores = attribution_patch(model, clean, corrupted, metric).node_scores
    measured = sweep(
        *(model, clean, corrupted),
        sites="z",
        by=("layer", "pos", "head"),
        metric=logit_diff(3, 7),
        verify=0,
    )
    for layer in range(3):
        for position in range(4):
            for head in range(4):
                node = Node("attn_head_out", position, layer, head)
                effect = measured.values[layer, position, head].item() - measured.reference
                assert scores[node] == pytest.approx(effect, abs=1e-8)
    assert max(map(abs, scores.values())) > 1e-6


def test_parameters_need_no_gradients_and_hooks_go():
    model, frozen = ours("gpt2"), ours("gpt2").requires_grad_(False)
    tokens = prompts(1, 5)
    for filters in (None, "blocks.1.attn.hook_z"):
        want = cache_activation_and_gradient(model, tokens, metric, filters)
        got = cache_activation_and_gradient(frozen, tokens, metric, filters)
        for name, gradient in want.gradients.items():
            assert_close_to(got.gradients[name], gradient, atol=1e-6)
            assert not got.activations[name].requires_grad
    assert not any(point.fwd_hooks for point in frozen.hook_dict.values())
    plain = cache_activation_and_gradient(model, tokens, metric, compute_gradient=False)
    assert set(plain.gradients.values()) == {None} and not plain.metric.requires_grad


def test_attention_only_models_have_no_mlp_nodes():
    model = ours("attn_only")
    result = attribution_patch(model, prompts(1, 4), prompts(1, 4, 1), metric)
    assert {node.kind for node in result.node_scores} == {"embed", "attn_head_out"}
    assert len(result.node_scores) == 4 + 2 * 4 * 4
    assert len(result.top_nodes(1000)) == len(result.node_scores)


def test_what_is_refused():
    model, tokens = ours("gpt2"), prompts(2, 5)
    with torch.no_grad(), pytest.raises(ValueError, match="while gradients are off"):
        cache_activation_and_gradient(model, tokens, metric)
    with pytest.raises(ValueError, match="matches no hook point"):
        cache_activation_and_gradient(model, tokens, metric, "blocks.9.hook_q")
    with pytest.raises(ValueError, match="must return a scalar"):
        cache_activation_and_gradient(model, tokens, lambda x: x[:, -1, 0])
    with pytest.raises(ValueError, match="of one shape"):
        attribution_patch(model, tokens, tokens[:, 1:], metric)
    with pytest.raises(ValueError, match="hook_mlp_out"):
        enumerate_nodes(model, GradientCache({"hook_embed": tokens}, {}, torch.tensor(0.0)))
    assert AttributionResult({}).top_nodes() == []
    # No pairs have no scores, as in TransformerLens.
    assert attribution_patch(model, tokens[:0], tokens[:0], metric).node_scores == {}
