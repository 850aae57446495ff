"""Tiny models with weights that are nowhere trivial, ours and TransformerLens' with equal ones."""

import warnings
from typing import Any

import torch

from fastlens import HookedTransformer
from tests.configs import D_VOCAB, tiny


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give biases and gains values too: at their initial zeros and ones they would test nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "W_" not in name:
                noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32) * 0.3
                leaf.copy_(noise + (1.0 if name.endswith(".w") else 0.0))


def ours(name: str, **changes: Any) -> HookedTransformer:
    """A tiny fastlens model of ``tests.configs.tiny(name, **changes)``, in eval mode."""
    model = HookedTransformer(tiny(name, **changes))
    randomise(model)
    return model.eval()


def theirs(name: str, **changes: Any) -> Any:
    """The same model built by TransformerLens (import it with ``pytest.importorskip`` first)."""
    import transformer_lens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformer_lens.HookedTransformerConfig(**tiny(name, **changes))
        model = transformer_lens.HookedTransformer(cfg)
    randomise(model)
    if cfg.num_experts:
        # Its experts are drawn in float32 whatever the config says.
        model.to(cfg.dtype)
        model.load_state_dict(ours(name, **changes).state_dict(), strict=False)
    return model.eval()


def prompts(batch: int = 3, pos: int = 11, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch, pos] for a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, D_VOCAB, (batch, pos), generator=generator)
