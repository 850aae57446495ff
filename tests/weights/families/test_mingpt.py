"""minGPT as Othello-GPT has it, against TransformerLens' converter."""

import warnings

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.errors import ConfigError
from fastlens.weights.families.mingpt import FAMILY
from fastlens.weights.source import open_source
from tests.close import assert_close_to
from tests.weights.families.facts import check_aliases
from tests.weights.families.generated import tokens_of
from tests.weights.toys import SIZES, save_toy

CONFIG = {**SIZES, "d_mlp": 128, "act_fn": "gelu", "architecture": "mingpt"}


def weights_of_mingpt() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    d, v, n_ctx = 32, 60, 24
    shapes = {"tok_emb.weight": (v, d), "pos_emb": (1, n_ctx, d), "head.weight": (v, d)}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    for layer in range(2):
        b = f"blocks.{layer}."
        for part, (rows, columns) in {
            "attn.query": (d, d), "attn.key": (d, d), "attn.value": (d, d), "attn.proj": (d, d),
            "mlp.0": (128, d), "mlp.2": (d, 128),
        }.items():  # fmt: skip
            shapes |= {f"{b}{part}.weight": (rows, columns), f"{b}{part}.bias": (rows,)}
        for norm in ("ln1", "ln2"):
            shapes |= {f"{b}{norm}.weight": (d,), f"{b}{norm}.bias": (d,)}
        shapes[f"{b}attn.mask"] = (1, 1, n_ctx, n_ctx)
    return {
        name: torch.randn(shape, generator=generator) * 0.15
        + (1.0 if "ln" in name and "weight" in name else 0.0)
        for name, shape in shapes.items()
    }


@pytest.mark.tl
def test_logits_are_transformer_lens(tmp_path):
    transformer_lens = pytest.importorskip("transformer_lens")
    from transformer_lens.pretrained.weight_conversions import convert_mingpt_weights

    weights = weights_of_mingpt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {k: v for k, v in CONFIG.items() if k not in ("architecture", "normalization")}
        cfg = transformer_lens.HookedTransformerConfig(**fields, device="cpu")
        theirs = transformer_lens.HookedTransformer(cfg)
        theirs.load_state_dict(convert_mingpt_weights(dict(weights), cfg), strict=False)
    folder = save_toy(tmp_path, CONFIG, weights)
    ours = HookedTransformer.from_pretrained_no_processing(folder, verbose=False)
    with torch.no_grad():
        want = theirs.eval()(tokens_of())
        assert_close_to(ours(tokens_of()), want, atol=1e-5, name="logits")
        folded = HookedTransformer.from_pretrained(folder, verbose=False)(tokens_of())
        assert_close_to(folded.log_softmax(-1), want.log_softmax(-1), atol=2e-5, name="log p")


def test_another_norm_is_refused(tmp_path):
    folder = save_toy(tmp_path, {**CONFIG, "normalization": "RMS"}, weights_of_mingpt())
    with pytest.raises(ConfigError, match="normalization='RMS'"):
        open_source(folder)


@pytest.mark.tl
def test_names():
    assert check_aliases(FAMILY, "othello") == 2
