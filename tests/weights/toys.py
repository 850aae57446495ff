"""Tiny checkpoints in TransformerLens' own format."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens import HookedTransformer, HookedTransformerConfig

SIZES = {
    "d_model": 32, "n_layers": 2, "d_mlp": 48, "d_head": 8, "n_heads": 4, "n_ctx": 24,
    "d_vocab": 60, "act_fn": "solu_ln", "attn_only": False, "normalization": "LN",
}  # fmt: skip
# Of the run that trained the model.
RUN = {
    "lr_hidden": 2e-3, "seed": 5, "n_devices": 8, "betas": [0.9, 0.99], "ln_eps": 1e-5,
    "use_bfloat16_matmul": True, "neuron_temp": 1.0, "neuron_scale": 1.0, "version": 1,
    "n_params": 7, "tokens_per_step": 1024, "weight_init_scheme": "gpt2", "shortformer_pos": False,
}  # fmt: skip


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors, under the names TransformerLens gives a model of this config."""
    fields = {name: value for name, value in config.items() if name in SIZES}
    fields["normalization_type"] = fields.pop("normalization")
    cfg = HookedTransformerConfig(
        **fields, final_rms=config.get("final_rms", False), init_weights=False, device="cpu"
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(parameter.shape, generator=generator) * 0.15
        + (1.0 if name.endswith(".w") else 0.0)
        for name, parameter in HookedTransformer(cfg).named_parameters()
    }
    # Buffers that files of that time hold.
    for layer in range(cfg.n_layers):
        weights[f"blocks.{layer}.attn.mask"] = torch.ones(cfg.n_ctx, cfg.n_ctx).tril().bool()
        weights[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    return weights


def save_toy(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A folder as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(weights, folder / "model_final.pth")
    return folder
