"""Tiny T5s with random weights: transformers', ours and TransformerLens', and a tokenizer."""

import functools
import warnings
from typing import Any

import torch

from fastlens.config import HookedTransformerConfig
from fastlens.model.hooked_encoder_decoder import HookedEncoderDecoder

VOCAB = 60
PAD, EOS = 0, 1
# Distances of 30 tokens reach every bucket, the last one included.
CONFIG: dict[str, Any] = {
    "d_model": 16, "d_head": 5, "n_heads": 4, "d_mlp": 24, "d_vocab": VOCAB, "n_layers": 2,
    "n_ctx": 40, "eps": 1e-6, "act_fn": "relu", "use_attn_scale": False,
    "positional_embedding_type": "relative_positional_bias", "attention_dir": "bidirectional",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "tie_word_embeddings": True, "device": "cpu",
}  # fmt: skip
_HF = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 5, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
# Name -> arguments of T5Config; "untied" also gets an lm_head of its own.
CASES: dict[str, dict[str, Any]] = {
    "t5": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated-silu": {"feed_forward_proj": "gated-silu"},
    "gelu": {"feed_forward_proj": "gelu"},
}


def randomise(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Every parameter random, biases too; gains around one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator) * scale
            leaf.copy_(noise + (1.0 if leaf.ndim == 1 and "b_" not in name else 0.0))


@functools.cache
def hf_t5(case: str = "t5") -> Any:
    """transformers' model of a case, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(**{**_HF, **CASES[case]})
    model = transformers.T5ForConditionalGeneration(config).eval()
    if case == "untied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 16))
    randomise(model)
    return model


def ours_t5(tokenizer: Any = None, **changes: Any) -> HookedEncoderDecoder:
    """A tiny model of `CONFIG`, in eval mode."""
    model = HookedEncoderDecoder(HookedTransformerConfig(**{**CONFIG, **changes}), tokenizer)
    randomise(model)
    return model.eval()


def theirs_t5(tokenizer: Any = None, **changes: Any) -> Any:
    """The same model built by TransformerLens (import it with ``pytest.importorskip`` first)."""
    import transformer_lens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformer_lens.HookedTransformerConfig(**{**CONFIG, **changes})
        model = transformer_lens.HookedEncoderDecoder(cfg, tokenizer)
    randomise(model)
    return model.eval()


@functools.cache
def t5_tokenizer() -> Any:
    """A tokenizer of ``w0 w1 ...`` that ends texts in EOS and pads, as T5's."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(VOCAB - 3))]
    vocab = {word: n for n, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def batch(n_pos: int = 30, n_decoder_pos: int = 25) -> dict[str, torch.Tensor]:
    """Tokens for both stacks: padding right in row 0, left in row 1, none in row 2."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (3, n_pos), generator=generator)
    decoder = torch.randint(3, VOCAB, (3, n_decoder_pos), generator=generator)
    decoder[:, 0] = PAD
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0
    mask[1, :4] = 0
    return {"input": tokens, "decoder_input": decoder, "one_zero_attention_mask": mask}
