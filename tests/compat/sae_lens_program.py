"""What people do with SAELens: attach autoencoders, read and edit features, train one.

It prints what it finds, a line of JSON for each result: the same with TransformerLens, by ``python
sae_lens_program.py FOLDER``, and with fastlens, by ``python -m fastlens.compat ...``. The folder
holds the toy model's tokenizer.
"""

import json
import sys
import tempfile
import warnings
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

warnings.simplefilter("ignore")

import transformer_lens  # noqa: E402
from sae_lens import (  # noqa: E402
    SAE,
    ActivationsStore,
    GatedSAE,
    GatedSAEConfig,
    HookedSAETransformer,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402
from transformer_lens import HookedTransformerConfig, utils  # noqa: E402

D_MODEL, N_FEATURES = 32, 96


def report(name: str, value: Any) -> None:
    """Print one result; tensors become lists."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    sys.stdout.write(json.dumps({"name": name, "value": value}) + "\n")
    sys.stdout.flush()


def drawn(kind: type, config: type, hook: str, **fields: Any) -> Any:
    """An autoencoder of random weights; the same in every process."""
    cfg = config(d_in=D_MODEL, d_sae=N_FEATURES, **fields)
    cfg.metadata.hook_name = hook
    sae = kind(cfg)
    generator = torch.Generator().manual_seed(len(hook) + N_FEATURES)
    with torch.no_grad():
        for leaf in sae.parameters():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.25)
    return sae


def zero_features(acts: torch.Tensor, hook: Any, features: list[int]) -> torch.Tensor:
    """A hook that switches features off."""
    acts[..., features] = 0.0
    return acts


def attach(model: Any, tokens: torch.Tensor) -> None:
    """Every kind of autoencoder and place, with and without the error term."""
    logits, cache = model.run_with_cache(tokens)
    report("logits", logits[:, -1])
    z = {"reshape_activations": "hook_z"}
    saes = [
        drawn(StandardSAE, StandardSAEConfig, "blocks.1.hook_resid_pre"),
        drawn(JumpReLUSAE, JumpReLUSAEConfig, "blocks.0.hook_mlp_out"),
        drawn(TopKSAE, TopKSAEConfig, "blocks.1.attn.hook_z", k=6, **z),
        drawn(GatedSAE, GatedSAEConfig, "blocks.0.hook_attn_out"),
        drawn(StandardSAE, StandardSAEConfig, "blocks.1.hook_resid_post",
              normalize_activations="layer_norm"),
    ]  # fmt: skip
    for sae in saes:
        hook = sae.cfg.metadata.hook_name
        codes = sae.encode(cache[hook])
        report(f"{hook} codes", codes.flatten(0, -2)[:3])
        report(f"{hook} reconstruction", sae(cache[hook])[0, -1])
        out = model.run_with_saes(tokens, saes=[sae])
        report(f"{hook} spliced in", out[:, -1])
        out = model.run_with_saes(tokens, saes=sae, use_error_term=True)
        report(f"{hook} changes nothing", bool((out - logits).abs().max() < 1e-5))
        _, its_cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
        places = [name for name in its_cache if hook in name]
        report(f"{hook} places", places)
        report(f"{hook} cached codes", its_cache[f"{hook}.hook_sae_acts_post"].sum((0, 1)))
        edited = model.run_with_hooks_with_saes(
            tokens,
            saes=[sae],
            fwd_hooks=[(f"{hook}.hook_sae_acts_post", partial(zero_features, features=[1, 5, 90]))],
        )
        report(f"{hook} edited", edited[:, -1])
    together = model.run_with_saes(tokens, saes=saes, use_error_term=True)
    report("all change nothing", bool((together - logits).abs().max() < 1e-5))
    report("all", model.run_with_saes(tokens, saes=saes)[:, -1])

    first, second = saes[:2]
    model.add_sae(first)
    with model.saes(saes=[second]):
        report("attached in the context", sorted(model.acts_to_saes))
        report("hooks in the context", [name for name in model.hook_dict if "sae" in name])
        loss = model(tokens, return_type="loss")
        report("loss in the context", loss)
    report("attached after", sorted(model.acts_to_saes))
    model.add_sae(first, use_error_term=True)
    out = model(tokens)
    report("attached with error term", bool((out - logits).abs().max() < 1e-5))
    out.sum().backward()
    report("gradient arrives", first.W_dec.grad.norm() > 0)
    model.zero_grad()
    model.reset_saes()
    report("attached at the end", sorted(model.acts_to_saes))
    report("as before", bool((model(tokens) - logits).abs().max() < 1e-5))
    model.add_sae(first)
    try:
        model.add_hook("blocks.1.hook_resid_pre.hook_sae_acts_post", zero_features)
        report("hooks on an autoencoder", len(first.hook_sae_acts_post.fwd_hooks))
    finally:
        model.reset_hooks()
        model.reset_saes()

    transcoder = drawn(
        Transcoder, TranscoderConfig, "blocks.0.mlp.hook_in",
        d_out=D_MODEL, apply_b_dec_to_input=False,
    )  # fmt: skip
    transcoder.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out"
    report("transcoder", model.run_with_saes(tokens, saes=[transcoder])[:, -1])
    out = model.run_with_saes(tokens, saes=[transcoder], use_error_term=True)
    report("transcoder changes nothing", bool((out - logits).abs().max() < 1e-5))


def saved_and_loaded(model: Any, tokens: torch.Tensor) -> None:
    """A folder of SAELens' is read back."""
    sae = drawn(StandardSAE, StandardSAEConfig, "blocks.1.hook_resid_pre")
    with tempfile.TemporaryDirectory() as place:
        sae.save_model(place)
        again = SAE.load_from_disk(place)
    report("loaded", model.run_with_saes(tokens, saes=[again])[:, -1])


def train(model: Any) -> None:
    """An activation store, and a short training run with its evaluation."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, model.cfg.d_vocab, (256, 16), generator=generator)
    dataset = Dataset.from_dict({"tokens": rows.tolist()})
    sae = drawn(StandardSAE, StandardSAEConfig, "blocks.1.hook_resid_pre")
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = 16, False
    store = ActivationsStore.from_sae(
        model, sae, dataset, streaming=False, store_batch_size_prompts=4,
        train_batch_size_tokens=16, total_tokens=256,
    )  # fmt: skip
    tokens = store.get_batch_tokens(4)
    report("store tokens", tokens)
    report("store activations", store.get_activations(tokens).flatten(0, -2).sum(-1))

    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, l1_coefficient=0.1),
        hook_name="blocks.1.hook_resid_pre", context_size=16, training_tokens=2048,
        train_batch_size_tokens=64, store_batch_size_prompts=8, n_batches_in_buffer=4,
        prepend_bos=False, lr=1e-3, n_eval_batches=2, eval_batch_size_prompts=4,
        n_checkpoints=0, checkpoint_path=None, output_path=None, device="cpu", seed=3,
        verbose=False, activations_mixing_fraction=0.0,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    torch.manual_seed(3)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    trained = runner.run()
    report("trained", trained.W_dec.norm(dim=-1)[:8])
    torch.manual_seed(4)
    metrics = runner.evaluator(trained, runner.activations_store, ActivationScaler())
    report("evaluated", metrics)


def main(folder: str) -> None:
    """All of it."""
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_ctx=32, d_head=8, n_heads=4, d_vocab=60,
        act_fn="gelu", seed=11, device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(cfg)
    report("kind", [kind.__name__ for kind in type(model).__mro__ if "Hooked" in kind.__name__])
    report("is a HookedTransformer", isinstance(model, transformer_lens.HookedTransformer))
    tokens = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(5))
    attach(model, tokens)
    saved_and_loaded(model, tokens)
    name = utils.get_act_name("resid_pre", 1)
    report("name", name)
    train(model)
    model.set_tokenizer(AutoTokenizer.from_pretrained(folder))
    sae = drawn(StandardSAE, StandardSAEConfig, name)
    text = model.to_tokens("a b c", prepend_bos=False) % 60
    report("special tokens left alone", model.run_with_saes(
        text, saes=[sae], exclude_special_tokens=[int(text[0, 0])]
    )[:, -1])  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
