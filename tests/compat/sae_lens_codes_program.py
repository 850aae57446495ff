"""Feature patching of SAELens' own autoencoders, held against SAELens' own hooked forward.

Run by ``python -m fastlens.compat sae_lens_codes_program.py``: a line of JSON for each autoencoder.
"""

import json
import sys
import warnings
from functools import partial
from typing import Any

import torch

warnings.simplefilter("ignore")

import sae_lens  # noqa: E402
from sae_lens_program import D_MODEL, drawn  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402

from fastlens import HookedTransformer  # noqa: E402
from fastlens.errors import SweepError  # noqa: E402
from fastlens.patching import codes, plan, sweep  # noqa: E402

CFG = HookedTransformerConfig(
    n_layers=2, d_model=D_MODEL, n_ctx=32, d_head=8, n_heads=4, d_vocab=60, act_fn="gelu",
    seed=11, device="cpu", dtype=torch.float64,
)  # fmt: skip
FEATURES = [0, 7, 33, 95]
KINDS = {
    "standard": ("StandardSAE", "blocks.1.hook_resid_pre", {}),
    "jumprelu": ("JumpReLUSAE", "blocks.0.hook_mlp_out", {}),
    "topk": ("TopKSAE", "blocks.1.attn.hook_z", {"k": 6, "reshape_activations": "hook_z"}),
    "topk rescaled": (
        "TopKSAE", "blocks.0.hook_resid_post", {"k": 6, "rescale_acts_by_decoder_norm": True},
    ),
    "gated": ("GatedSAE", "blocks.0.hook_attn_out", {}),
    "matching pursuit": (
        "MatchingPursuitSAE", "blocks.1.hook_resid_mid",
        {"residual_threshold": 0.1, "max_iterations": 4},
    ),
    "flat z": ("StandardSAE", "blocks.1.attn.hook_z", {}),
    "layer norm": (
        "StandardSAE", "blocks.1.hook_resid_pre", {"normalize_activations": "layer_norm"},
    ),
    "norm": (
        "StandardSAE", "blocks.1.hook_resid_post",
        {"normalize_activations": "constant_norm_rescale"},
    ),
    "layer norm of z": (
        "StandardSAE", "blocks.0.attn.hook_z",
        {"normalize_activations": "layer_norm", "reshape_activations": "hook_z"},
    ),
}  # fmt: skip


def report(name: str, value: Any) -> None:
    """Print one result."""
    sys.stdout.write(json.dumps({"name": name, "value": value}) + "\n")
    sys.stdout.flush()


def add(acts: torch.Tensor, hook: Any, pos: int, feature: int) -> torch.Tensor:
    """A hook that steers by one feature at one position."""
    acts[:, pos, feature] += 1.5
    return acts


def metric(logits: torch.Tensor) -> torch.Tensor:
    """Anything that sees every logit."""
    return logits[:, -1].square().sum(-1)


def check(name: str, clean: torch.Tensor, corrupted: torch.Tensor) -> None:
    """One autoencoder: each feature at each position, against SAELens."""
    model = HookedTransformer(CFG)
    theirs = sae_lens.HookedSAETransformer(CFG)
    theirs.load_state_dict(model.state_dict(), strict=False)
    kind, hook, fields = KINDS[name]
    sae = drawn(getattr(sae_lens, kind), getattr(sae_lens, f"{kind}Config"), hook, dtype="float64",
                **fields)  # fmt: skip
    asked = {"sites": codes(sae), "by": ("layer", "pos", "feature"), "features": FEATURES}
    scores = sweep(
        *(model, clean, corrupted), **asked, source=1.5, mode="add", metric=metric, verify="all"
    )
    worst = 0.0
    # SAELens passes no heads to a flat one, and matching pursuit passes no hook on its codes.
    is_hooked = name not in ("flat z", "matching pursuit")
    for pos in range(clean.shape[1] if is_hooked else 0):
        for i, feature in enumerate(FEATURES):
            with theirs.saes(saes=[sae], use_error_term=True):
                logits = theirs.run_with_hooks(
                    corrupted,
                    fwd_hooks=[
                        (f"{hook}.hook_sae_acts_post", partial(add, pos=pos, feature=feature))
                    ],
                )
            expected = metric(logits).mean()
            worst = max(worst, float((scores.values[0, pos, i] - expected).abs()))
    # On SAELens' own model, whose modules the wave does not know, it goes the plain way.
    on_theirs = sweep(
        *(theirs, clean, corrupted), **asked, source=1.5, mode="add", metric=metric
    ).values
    worst = max(worst, float((scores.values - on_theirs).abs().max()))
    ablated = sweep(model, clean, corrupted, **asked, source="zero", metric=metric, verify="all")
    other = sweep(model, clean, corrupted, **asked, metric=metric, verify="all")
    certified = [s.certificate["max_difference"] for s in (scores, ablated, other)]
    report(name, {
        "difference": worst,
        "certified": max(certified),
        "spread": float(scores.values.std()),
        "said": plan(model, clean, corrupted, **asked, metric=metric).codes[0].said,
    })  # fmt: skip


def refused(kind: str, hook: str, **fields: Any) -> str:
    """Why an autoencoder cannot be swept."""
    try:
        sae = drawn(getattr(sae_lens, kind), getattr(sae_lens, f"{kind}Config"), hook, **fields)
        sae.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out" if "d_out" in fields else None
        model = HookedTransformer(CFG)
        tokens = torch.zeros(1, 4, dtype=torch.long)
        plan(model, tokens, tokens + 1, sites=codes(sae), metric=metric)
    except SweepError as error:
        return str(error)
    return "accepted"


def main() -> None:
    """All kinds."""
    generator = torch.Generator().manual_seed(2)
    clean, corrupted = torch.randint(0, 60, (2, 2, 6), generator=generator)
    for name in KINDS:
        check(name, clean, corrupted)
    report("batch top-k", refused("BatchTopKTrainingSAE", "blocks.1.hook_resid_pre", k=4))
    report(
        "transcoder",
        refused("Transcoder", "blocks.0.hook_mlp_in", d_out=D_MODEL, apply_b_dec_to_input=False),
    )
    report("normalized", refused("StandardSAE", "blocks.0.ln2.hook_normalized"))


if __name__ == "__main__":
    main()
