"""What people do with circuit-tracer: attribution graphs, their pruning, interventions on features.

It prints what it finds, a line of JSON for each result: the same with TransformerLens, by ``python
circuit_tracer_program.py FOLDER``, and with fastlens, by ``python -m fastlens.compat ...``. The
folder holds the toy model's tokenizer, and HF_HUB_CACHE must be FOLDER/hub: the program lays a
model there as a download would. Models and transcoders are tiny, of random weights.
"""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from transformer_lens import HookedTransformer, HookedTransformerConfig

# circuit-tracer 0.5 is written for huggingface_hub 0.x, and imports this name; nothing is fetched.
huggingface_hub.constants.__dict__.setdefault("HF_HUB_ENABLE_HF_TRANSFER", False)

from circuit_tracer.__main__ import main as command_line
from circuit_tracer import Graph, ReplacementModel, attribute
from circuit_tracer.attribution import CustomTarget
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.utils import create_graph_files

warnings.simplefilter("ignore")
logging.getLogger("circuit_tracer.graph").setLevel(logging.ERROR)

MODEL = "mistralai/Mistral-7B-v0.1"
D_MODEL, N_FEATURES, D_VOCAB = 32, 48, 100
TEXT = "the dog ran to the cat"

BASE = {
    "n_layers": 3, "d_model": D_MODEL, "d_head": 8, "n_heads": 4, "n_ctx": 32, "d_vocab": D_VOCAB,
    "act_fn": "gelu_new", "normalization_type": "LN", "seed": 1, "device": "cpu",
    "model_name": "tiny",
}  # fmt: skip
LLAMA = {
    **BASE, "n_key_value_heads": 2, "d_mlp": 48, "act_fn": "silu", "gated_mlp": True,
    "normalization_type": "RMS", "final_rms": True, "positional_embedding_type": "rotary",
    "rotary_dim": 8,
}  # fmt: skip
GEMMA = {
    **LLAMA, "act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True,
    "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 10.0, "use_local_attn": True,
    "window_size": 4, "attn_types": ["local", "global", "local"],
}  # fmt: skip


def report(name: str, value: Any) -> None:
    """Print one result; tensors become lists."""
    if isinstance(value, torch.Tensor):
        value = (value.to_dense() if value.is_sparse else value).detach().tolist()
    print(json.dumps({"name": name, "value": value}), flush=True)


def draw(module: torch.nn.Module, scale: float, seed: int) -> None:
    """Random weights: the same in every process, whatever the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in sorted(module.named_parameters()):
            noise = torch.randn(leaf.shape, generator=generator) * scale
            leaf.copy_(noise + 1.0 if name.endswith(".w") else noise)


def transcoders(kind: str, n_layers: int) -> Any:
    """Random transcoders, some of whose features fire."""
    if kind == "cross layer":
        found = CrossLayerTranscoder(
            n_layers, N_FEATURES, D_MODEL, lazy_decoder=False, dtype=torch.float32,
            device=torch.device("cpu"), scan="tiny",
        )  # fmt: skip
        draw(found, 0.1, 3)
        with torch.no_grad():
            found.b_enc -= 0.3
        return found
    is_skip = kind == "skip"
    layers = {}
    for layer in range(n_layers):
        function: Any = torch.nn.functional.relu
        if kind == "jump":
            function = JumpReLU(torch.full((N_FEATURES,), 0.4), 0.1)
        elif kind == "topk":
            function = TopK(6)
        layers[layer] = SingleLayerTranscoder(
            D_MODEL, N_FEATURES, function, layer, skip_connection=is_skip, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        draw(layers[layer], 0.1, 10 + layer)
        with torch.no_grad():
            layers[layer].b_enc -= 0.3
            if kind == "jump":
                function.threshold.fill_(0.4)
    places = {"skip": ("mlp.hook_in", "mlp.hook_out"), "jump": ("ln2.hook_normalized",)}
    read, write = (*places.get(kind, ("hook_resid_mid",)), "hook_mlp_out")[:2]
    return TranscoderSet(layers, feature_input_hook=read, feature_output_hook=write, scan="tiny")


def built(fields: dict[str, Any], kind: str, folder: Path) -> Any:
    """A replacement model, by a config."""
    cfg = HookedTransformerConfig(**fields, tokenizer_name=str(folder / "toy"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    model = ReplacementModel.from_config(
        cfg, transcoders(kind, cfg.n_layers), tokenizer=tokenizer
    )  # fmt: skip
    draw(torch.nn.ModuleList([model.embed, model.blocks, model.ln_final, model.unembed]), 0.2, 4)
    return model


def graphs(name: str, model: Any, folder: Path) -> None:
    """An attribution graph: whole, limited to some features, of other targets, and stored."""
    graph = attribute(TEXT, model, batch_size=64, max_n_logits=4)
    report(f"{name} tokens", graph.input_tokens)
    report(f"{name} string", graph.input_string)
    report(f"{name} features", graph.active_features.shape[0])
    report(f"{name} values", graph.activation_values)
    report(f"{name} targets", [list(target) for target in graph.logit_targets])
    report(f"{name} probabilities", graph.logit_probabilities)
    report(f"{name} edges", graph.adjacency_matrix[-4:])
    report(f"{name} all edges", [graph.adjacency_matrix.sum().item(),
                                 graph.adjacency_matrix.norm().item()])  # fmt: skip
    report(f"{name} scores", list(compute_graph_scores(graph)))
    pruned = prune_graph(graph, node_threshold=0.6, edge_threshold=0.8)
    report(f"{name} pruned", [int(pruned.node_mask.sum()), int(pruned.edge_mask.sum())])
    some = attribute(
        model.to_tokens(TEXT), model, batch_size=8, max_n_logits=3, max_feature_nodes=20,
        update_interval=1,
    )  # fmt: skip
    report(f"{name} some features", sorted(some.selected_features.tolist()))
    report(f"{name} edges to some", some.adjacency_matrix.abs().sum(1))
    for targets in (
        torch.tensor([5, 7]),
        ["a", "d"],
        [CustomTarget("direction", 0.5, model.W_U[:, 5] - model.W_U[:, 7])],
    ):
        chosen = attribute(
            TEXT, model, attribution_targets=targets, batch_size=64, max_feature_nodes=30
        )
        report(f"{name} chosen {type(targets[0]).__name__}", chosen.adjacency_matrix[-1])
    again = attribute(TEXT, model, batch_size=64, max_n_logits=4, offload="cpu")
    same = torch.allclose(again.adjacency_matrix, graph.adjacency_matrix, atol=1e-5)
    report(f"{name} offloaded", same)
    with tempfile.TemporaryDirectory() as place:
        graph.to_pt(f"{place}/graph.pt")
        loaded = Graph.from_pt(f"{place}/graph.pt")
        same = torch.equal(loaded.adjacency_matrix, graph.adjacency_matrix)
        report(f"{name} stored", [same, loaded.cfg.n_layers, loaded.cfg.d_vocab])
        create_graph_files(loaded, "drawn", place, node_threshold=0.6, edge_threshold=0.8)
        drawn = json.loads(Path(place, "drawn.json").read_text())
        report(f"{name} drawn nodes", [node["node_id"] for node in drawn["nodes"]])
        report(f"{name} drawn edges", [edge["weight"] for edge in drawn["links"]])


def edges_are_effects(name: str, model: Any) -> None:
    """What the graph says a feature does is what switching it on further does."""
    graph = attribute(TEXT, model, batch_size=64, max_n_logits=4)
    tokens = graph.input_tokens
    n_features = len(graph.active_features)
    with model.zero_softcap():
        before, pre = model.get_activations(tokens, apply_activation_function=False)
        worst = 0.0
        for place in range(0, n_features, max(1, n_features // 8)):
            layer, pos, feature = graph.active_features[place].tolist()
            value = graph.activation_values[place]
            after, post = model.feature_intervention(
                tokens,
                [(layer, pos, feature, 2 * value)],
                constrained_layers=range(model.cfg.n_layers),
                apply_activation_function=False,
            )
            moved = (post - pre)[tuple(graph.active_features.T)]
            worst = max(worst, (moved - graph.adjacency_matrix[:n_features, place]).abs().max())
            logits = (after - before)[0, -1]
            logits = (logits - logits.mean())[graph.logit_token_ids]
            edges = graph.adjacency_matrix[-len(logits) :, place]
            worst = max(worst, (logits - edges).abs().max())
    report(f"{name} edges are effects", bool(worst < 1e-4))


def interventions(name: str, model: Any) -> None:
    """Features set to values: with attention frozen or not, in some layers, in a generation."""
    tokens = model.ensure_tokenized(TEXT)
    logits, acts = model.get_activations(tokens)
    report(f"{name} logits", logits[0, -1])
    report(f"{name} activations", acts.sum(-1))
    _, sparse = model.get_activations(tokens, sparse=True)
    report(f"{name} sparse activations", bool((sparse.to_dense() == acts).all()))
    _, before = model.get_activations(tokens, apply_activation_function=False)
    report(f"{name} before the function", before[:, -1, :5])
    layer, pos, feature = acts.nonzero()[0].tolist()
    one = [(layer, pos, feature, 3.0), (model.cfg.n_layers - 1, slice(2, None), 7, 1.5)]
    for label, options in {
        "frozen": {},
        "free": {"freeze_attention": False},
        "constrained": {"constrained_layers": range(0, 2)},
        "direct": {"constrained_layers": range(model.cfg.n_layers)},
        "sparse": {"sparse": True},
        "before": {"apply_activation_function": False},
        "bare": {"return_activations": False},
    }.items():
        found, its_acts = model.feature_intervention(tokens, one, **options)
        report(f"{name} {label}", found[0, -1])
        if its_acts is not None:
            report(f"{name} {label} features", its_acts.to_dense().sum((1, 2)))
    text, found, its_acts = model.feature_intervention_generate(
        TEXT, one, do_sample=False, max_new_tokens=4, verbose=False
    )
    report(f"{name} generated", text)
    report(f"{name} generated logits", found[:, :12])
    report(f"{name} generated features", its_acts.sum(-1))
    report(f"{name} as before", bool((model(tokens) - logits).abs().max() < 1e-5))


def in_the_hub_cache(folder: Path, repository: str) -> Path:
    """A folder of the hub's cache, as a download leaves it."""
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def from_the_hub(folder: Path) -> None:
    """A pretrained model and published transcoders by their names, as the documents show."""
    cfg = MistralConfig(
        vocab_size=D_VOCAB, hidden_size=D_MODEL, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = MistralForCausalLM(cfg)
    draw(theirs, 0.2, 6)
    place = in_the_hub_cache(folder, MODEL)
    theirs.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder / "toy").save_pretrained(place)
    place = in_the_hub_cache(folder, "someone/transcoders")
    transcoders("jump", 2).to_safetensors(str(place))
    (place / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\n"
    )
    model = ReplacementModel.from_pretrained(MODEL, "someone/transcoders", dtype=torch.float32)
    report("hub config", [model.cfg.model_name, model.cfg.normalization_type, model.scan])
    tokens = model.ensure_tokenized(TEXT)
    far = (model(tokens) - theirs(tokens[None]).logits).abs().max()
    report("hub model is the model", bool(far < 1e-4))
    graph = attribute(TEXT, model, batch_size=64, max_n_logits=4)
    report("hub edges", graph.adjacency_matrix[-4:])
    edges_are_effects("hub", model)
    with tempfile.TemporaryDirectory() as place:
        command = f"circuit-tracer attribute -m {MODEL} -t someone/transcoders -p".split()
        files = ["--graph_output_path", f"{place}/graph.pt", "--graph_file_dir", f"{place}/files"]
        sys.argv = [*command, TEXT, *files, "--slug", "drawn", "--batch_size", "64"]
        command_line()
        report("command line edges", Graph.from_pt(f"{place}/graph.pt").adjacency_matrix[-3:])
        drawn = json.loads(Path(place, "files", "drawn.json").read_text())
        report("command line drawn", [node["node_id"] for node in drawn["nodes"]])


def main(folder: Path) -> None:
    """All of it."""
    for name, fields, kind in (
        ("gpt2", BASE, "relu"),
        ("gpt2 topk", BASE, "topk"),
        ("llama", LLAMA, "skip"),
        ("gemma", GEMMA, "jump"),
        ("cross layer", BASE, "cross layer"),
    ):
        model = built(fields, kind, folder)
        report(f"{name} kind", [isinstance(model, HookedTransformer), model.backend])
        report(f"{name} hooks", sorted(model.hook_dict))
        interventions(name, model)
        graphs(name, model, folder)
        edges_are_effects(name, model)
    from_the_hub(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
