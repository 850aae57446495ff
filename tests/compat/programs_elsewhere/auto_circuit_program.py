"""What people do with AutoCircuit: patchable models, scores of edges by five methods, circuits.

It prints what it finds, a line of JSON for each result: the same with TransformerLens, by ``python
auto_circuit_program.py FOLDER``, and with fastlens, by ``python -m fastlens.compat ...``. The
folder holds the toy model's tokenizer. Models are tiny, of random weights.
"""

import contextlib
import copy
import importlib
import io
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from auto_circuit.data import PromptDataLoader, PromptDataset, load_datasets_from_json
from auto_circuit.metrics.official_circuits.circuits.greaterthan_official import (
    greaterthan_true_edges,
)
from auto_circuit.metrics.official_circuits.circuits.ioi_official import (
    ioi_head_based_official_edges,
    ioi_true_edges,
)
from auto_circuit.metrics.prune_metrics.answer_diff import measure_answer_diff
from auto_circuit.metrics.prune_metrics.answer_diff_percent import answer_diff_percent
from auto_circuit.metrics.prune_metrics.answer_value import measure_answer_val
from auto_circuit.metrics.prune_metrics.correct_answer_percent import measure_correct_ans_percent
from auto_circuit.metrics.prune_metrics.kl_div import measure_kl_div
from auto_circuit.model_utils.sparse_autoencoders.autoencoder_transformer import sae_model
from auto_circuit.model_utils.task_projectors.projector_transformer import get_projector_model
from auto_circuit.prune import run_circuits
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.activation_magnitude import activation_magnitude_prune_scores
from auto_circuit.prune_algos.circuit_probing import circuit_probing_prune_scores
from auto_circuit.prune_algos.edge_attribution_patching import (
    edge_attribution_patching_prune_scores,
)
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.prune_algos.subnetwork_probing import subnetwork_probing_prune_scores
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.ablation_activations import batch_src_ablations, src_ablations
from auto_circuit.utils.graph_utils import edge_counts_util, patch_mode, patchable_model
from auto_circuit.utils.misc import run_prompt
from auto_circuit.visualize import draw_seq_graph
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from transformer_lens import HookedTransformer, HookedTransformerConfig

warnings.simplefilter("ignore")
# AutoCircuit 1.0 reads this module from `torch.optim`, where newer torch does not keep it.
torch.optim.__dict__.setdefault("adam", importlib.import_module("torch.optim.adam"))

D_VOCAB = 100
BASE = {
    "n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "n_ctx": 32, "d_vocab": D_VOCAB,
    "act_fn": "gelu_new", "normalization_type": "LN", "seed": 1, "device": "cpu",
    "model_name": "tiny",
}  # fmt: skip
MODELS = {
    "gpt2": BASE,
    "attention only": {**BASE, "attn_only": True, "act_fn": None},
    "neox": {**BASE, "parallel_attn_mlp": True, "positional_embedding_type": "rotary",
             "rotary_dim": 4},
    "llama": {**BASE, "n_key_value_heads": 2, "d_mlp": 48, "act_fn": "silu", "gated_mlp": True,
              "normalization_type": "RMS", "final_rms": True,
              "positional_embedding_type": "rotary", "rotary_dim": 8,
              "ungroup_grouped_query_attention": True},
}  # fmt: skip


def report(name: str, value: Any) -> None:
    """Print one result; tensors become lists."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    print(json.dumps({"name": name, "value": value}), flush=True)


def report_scores(name: str, scores: dict[str, torch.Tensor]) -> None:
    """Scores of every edge, by module."""
    report(name, {place: scores[place].flatten().tolist() for place in sorted(scores)})


def draw(module: torch.nn.Module, scale: float, seed: int) -> None:
    """Random weights: the same in every process, whatever the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in sorted(module.named_parameters()):
            noise = torch.randn(leaf.shape, generator=generator) * scale
            leaf.copy_(noise + 1.0 if name.endswith(".w") else noise)


def built(name: str, **changes: Any) -> HookedTransformer:
    """A model as `load_tl_model` of AutoCircuit prepares it."""
    model = HookedTransformer(HookedTransformerConfig(**{**MODELS[name], **changes}))
    draw(model, 0.2, 4)
    model.cfg.use_attn_result = True
    model.cfg.use_attn_in = True
    model.cfg.use_split_qkv_input = True
    model.cfg.use_hook_mlp_in = True
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model


def patchable(model: HookedTransformer, **options: Any) -> Any:
    """The patchable model, its edges in an order that does not depend on hashes."""
    options = {"factorized": True, "slice_output": "last_seq", "separate_qkv": True, **options}
    found = patchable_model(model, device=torch.device("cpu"), **options)
    found.edges = sorted(found.edges, key=lambda edge: (edge.name, edge.seq_idx or 0))
    return found


def loader(n_prompts: int = 6, length: int = 7, batch_size: int = 3) -> PromptDataLoader:
    """Prompts of random tokens, clean and corrupt ones that differ in one place."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(4, D_VOCAB, (n_prompts, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2] = torch.randint(4, D_VOCAB, (n_prompts,), generator=generator)
    answers = torch.randint(4, D_VOCAB, (2, n_prompts, 1), generator=generator)
    prompts = PromptDataset(clean, corrupt, list(answers[0]), list(answers[1]))
    return PromptDataLoader(prompts, seq_len=length, diverge_idx=0, batch_size=batch_size)


def methods(name: str, model: Any, data: PromptDataLoader) -> dict[str, torch.Tensor]:
    """Every method that scores edges; the scores of one."""
    found = {}
    for gradient, answer in (
        ("logit", "avg_diff"), ("prob", "avg_val"), ("logprob", "avg_diff"),
        ("logit_exp", "avg_val"),
    ):  # fmt: skip
        found[gradient] = mask_gradient_prune_scores(
            model, data, None, grad_function=gradient, answer_function=answer, mask_val=0.0
        )
        report_scores(f"{name} gradient of {gradient}", found[gradient])
        model.zero_grad()
    integrated = mask_gradient_prune_scores(
        model, data, None, grad_function="logit", answer_function="avg_diff",
        integrated_grad_samples=4, ablation_type=AblationType.TOKENWISE_MEAN_CORRUPT,
        clean_corrupt=None,
    )  # fmt: skip
    report_scores(f"{name} integrated gradients", integrated)
    report_scores(f"{name} magnitudes", activation_magnitude_prune_scores(model, data, None))
    # The default, "hard_concrete", finds other scores in every process with TransformerLens too.
    probed = subnetwork_probing_prune_scores(
        model, data, None, epochs=3, mask_fn="sigmoid", regularize_lambda=0.1
    )
    report_scores(f"{name} subnetwork probing", probed)
    sized = circuit_probing_prune_scores(
        model, data, None, epochs=2, circuit_sizes=[5, 20], tree_optimisation=True,
        mask_fn="sigmoid",
    )  # fmt: skip
    report(f"{name} circuit probing", sum(scores.sum().item() for scores in sized.values()))
    return found["logit"]


def circuits(name: str, model: Any, data: PromptDataLoader, scores: Any) -> None:
    """Circuits of some sizes, run with every ablation, and what is left of the behaviour."""
    counts = [3, 10, min(30, model.n_edges)]
    sizes = edge_counts_util(set(model.edges), test_counts=counts, prune_scores=scores)
    for patch in PatchType:
        for ablation in AblationType:
            outs = run_circuits(
                model, data, sizes, scores, patch_type=patch, ablation_type=ablation
            )
            where = f"{name} {patch} {ablation}"
            report(f"{where} kl", measure_kl_div(model, data, outs))
    outs = run_circuits(model, data, sizes, scores, patch_type=PatchType.TREE_PATCH)
    report(f"{name} diffs", measure_answer_diff(model, data, outs, prob_func="logits"))
    report(f"{name} values", measure_answer_val(model, data, outs, prob_func="softmax"))
    report(f"{name} right", measure_correct_ans_percent(model, data, outs))
    means, deviations, _ = answer_diff_percent(model, data, outs, prob_func="logits")
    report(f"{name} percents", [means, deviations])
    report(f"{name} outputs", {
        size: sum(out.sum().item() for out in outs[size].values()) for size in outs
    })  # fmt: skip
    batch = next(iter(data))
    ablations = batch_src_ablations(model, data, clean_corrupt="corrupt")[batch.key]
    report(f"{name} sources", ablations.norm(dim=-1).sum((1, 2)))
    some = {edge.name for edge in model.edges[::5]}
    with patch_mode(model, ablations, some), torch.inference_mode():
        report(f"{name} patched", model(batch.clean)[model.out_slice][:, :8])
        figure = draw_seq_graph(model, score_threshold=0.01, display_ipython=False)
    report(f"{name} drawn", [len(figure.data), len(figure.data[0].link.value)])
    report(f"{name} as before", model(batch.clean)[model.out_slice][:, :8])


def acdc(name: str, model: Any, data: PromptDataLoader) -> None:
    """ACDC, checked on its way (for one threshold) against runs of the whole pruned model."""
    for target, powers in (("kl_div", [-4]), ("mse", [-4, -3])):
        scores = acdc_prune_scores(
            model, data, None, tao_exps=powers, tao_bases=[1], faithfulness_target=target,
            test_mode=len(powers) == 1, run_circuits_ref=run_circuits,
        )  # fmt: skip
        report_scores(f"{name} acdc {target}", {k: v.clamp(max=9.0) for k, v in scores.items()})


def attribution(name: str, model: Any, data: PromptDataLoader, scores: Any) -> None:
    """Edge attribution patching, slowly, by backward hooks: the mask's gradients at zero."""
    slow = edge_attribution_patching_prune_scores(model, data, None)
    report_scores(f"{name} edge attribution", slow)
    far = max((slow[place] - scores[place]).abs().max().item() for place in slow)
    report(f"{name} edge attribution is the mask's gradient", far < 1e-4)


def from_text(folder: Path) -> None:
    """Prompts of text from a file, and the keys and values of their common beginning kept."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "toy")
    rows = [
        {"clean": f"the dog ran to the {a}", "corrupt": f"the dog ran on the {b}",
         "answers": ["a"], "wrong_answers": ["d"]}
        for a, b in zip("abcdefgh", "hgfedcba", strict=True)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "prompts.json"
        path.write_text(json.dumps({"prompts": rows, "word_idxs": {"end": 4}}))
        for is_tail in (False, True):
            name = "tail" if is_tail else "text"
            model = built("gpt2")
            model.set_tokenizer(tokenizer)
            if not is_tail:
                words = io.StringIO()
                with contextlib.redirect_stdout(words):
                    run_prompt(model, "the dog ran", "a", top_k=3)
                report("prompt", words.getvalue().split("\n"))
            # AutoCircuit puts BOS in front itself, and takes GPT-2's tokenizer, which adds none.
            plain = TemplateProcessing(single="$A", pair="$A $B")
            model.tokenizer.backend_tokenizer.post_processor = plain
            with contextlib.redirect_stdout(io.StringIO()):
                train, test = load_datasets_from_json(
                    model, path, torch.device("cpu"), prepend_bos=True, batch_size=2,
                    train_test_size=(4, 4), return_seq_length=True, tail_divergence=is_tail,
                    shuffle=False,
                )  # fmt: skip
            report(f"{name} clean", [batch.clean.tolist() for batch in train])
            report(f"{name} length", [train.seq_len, train.diverge_idx, train.word_idxs])
            wrapped = patchable(
                model, seq_len=train.seq_len, kv_caches=(train.kv_cache, test.kv_cache)
            )
            batch = next(iter(test))
            report(f"{name} logits", wrapped(batch.clean)[:, -1])
            scores = mask_gradient_prune_scores(
                wrapped, train, None, grad_function="logit", answer_function="avg_diff",
                mask_val=0.0,
            )  # fmt: skip
            report(f"{name} scores", [[scores[k].sum().item(), scores[k].norm().item()]
                                      for k in sorted(scores)])  # fmt: skip
            outs = run_circuits(wrapped, test, [2, 20], scores, PatchType.TREE_PATCH)
            report(f"{name} kl", measure_kl_div(wrapped, test, outs))


def with_autoencoders(data: PromptDataLoader) -> None:
    """Autoencoders, and projectors, where hook points were."""
    torch.manual_seed(3)
    batch = next(iter(data))
    for place in ("resid_delta_mlp", "mlp_post_act"):
        model = built("gpt2", d_mlp=32)
        before = model(batch.clean)
        holder = sae_model(model, place, load_pretrained=False, n_latents=24)
        for layer, sae in enumerate(holder.sparse_autoencoders):
            draw(sae, 0.2, 20 + layer)
        with torch.no_grad():
            report(f"autoencoders {place}", holder(batch.clean)[:, -1])
        with contextlib.redirect_stdout(io.StringIO()):
            holder._prune_latents_with_dataset(data, max_latents=6)
        report(f"autoencoders {place} pruned", holder(batch.clean)[:, -1])
        _, cache = holder.run_with_cache(batch.clean)
        report(f"autoencoders {place} cache", [k for k in cache if "latent" in k or "wrapp" in k])
        if place == "resid_delta_mlp":
            wrapped = patchable(holder)
            scores = mask_gradient_prune_scores(
                wrapped, data, None, grad_function="logit", answer_function="avg_diff",
                mask_val=0.0,
            )  # fmt: skip
            report_scores("autoencoders scores", scores)
        report(f"autoencoders {place} first", torch.equal(model(batch.clean), before))
    model = built("gpt2")
    projected = get_projector_model(
        model, "resid", None, load_pretrained=False, layer_idxs=[0, 1], seq_idxs=[3, 4]
    )
    for layer, projector in enumerate(projected.projectors):
        draw(projector, 0.2, 30 + layer)
    report("projectors", projected(batch.clean)[:, -1])


def official_circuits() -> None:
    """The published circuits' edges, on a model of GPT-2's shape."""
    model = built("gpt2", n_layers=12, n_heads=12, d_head=2, model_name="gpt2")
    wrapped = patchable(copy.deepcopy(model), seq_len=None)
    for function in (ioi_true_edges, greaterthan_true_edges):
        edges = function(wrapped)
        report(function.__name__, sorted(edge.name for edge in edges))
    simple = patchable(copy.deepcopy(model), factorized=False, separate_qkv=False)
    edges = ioi_head_based_official_edges(simple)
    report("ioi heads", sorted(edge.name for edge in edges))
    batch = next(iter(loader()))
    ablations = src_ablations(simple, batch.corrupt)
    with patch_mode(simple, ablations, edges), torch.inference_mode():
        report("ioi heads patched", simple(batch.clean)[simple.out_slice][:, :8])
    report("the copied model", model(batch.clean)[:, -1, :8])


def main(folder: Path) -> None:
    """All of it."""
    random.seed(0)
    data = loader()
    for name in MODELS:
        choices: list[dict[str, Any]] = [{}]
        if name == "gpt2":
            choices += [{"seq_len": 7}, {"separate_qkv": False}, {"factorized": False}]
        for options in choices:
            model = built(name)
            if options.get("separate_qkv") is False:
                model.cfg.use_split_qkv_input = False
            first = model(next(iter(data)).clean)
            wrapped = patchable(model, **options)
            title = " ".join([name, *map(str, options)])
            report(f"{title} model", [wrapped.n_edges, len(wrapped.srcs), len(wrapped.dests)])
            again = wrapped(next(iter(data)).clean)
            report(f"{title} wrapped", bool((first - again).abs().max() < 1e-5))
            if options.get("factorized") is False:
                scores = mask_gradient_prune_scores(
                    wrapped, data, None, grad_function="logit", answer_function="avg_diff",
                    mask_val=0.0,
                )  # fmt: skip
                report_scores(f"{title} gradient", scores)
            else:
                scores = methods(title, wrapped, data)
            circuits(title, wrapped, data, scores)
            if not options:
                acdc(title, wrapped, data)
                attribution(title, wrapped, data, scores)
    from_text(folder)
    with_autoencoders(data)
    official_circuits()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
