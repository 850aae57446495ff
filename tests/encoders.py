"""Tiny BERTs: ours, TransformerLens' and transformers', with weights that are nowhere trivial."""

import functools
import warnings
from typing import Any

import torch

from fastlens.model.hooked_encoder import HookedEncoder

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the a cat dog sat ran ##s ##ning".split()]
D_VOCAB, N_CTX, N_POS = 40, 24, 11
_CONFIG: dict[str, Any] = {
    "d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 3, "n_ctx": N_CTX, "d_vocab": D_VOCAB,
    "d_mlp": 48, "act_fn": "gelu", "normalization_type": "LN", "eps": 1e-12, "device": "cpu",
    "attention_dir": "bidirectional", "seed": 0,
}  # fmt: skip
_HF: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": N_CTX,
}  # fmt: skip


def ours(tokenizer: Any = None, **changes: Any) -> HookedEncoder:
    """A tiny encoder with random biases and gains too."""
    model = HookedEncoder({**_CONFIG, **changes}, tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.2 + name.endswith("ln.w"))
    return model.eval()


def pair(tokenizer: Any = None, **changes: Any) -> tuple[Any, HookedEncoder]:
    """TransformerLens' encoder and ours, weights equal."""
    import transformer_lens

    model = ours(tokenizer, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = transformer_lens.HookedTransformerConfig(**{**_CONFIG, **changes})
        reference = transformer_lens.HookedEncoder(cfg, tokenizer, move_to_device=False)
    reference.load_state_dict(model.state_dict())
    return reference.eval(), model


@functools.cache
def hf_bert(name: str = "BertForPreTraining", dtype: str = "float32", **changes: Any) -> Any:
    """A transformers BERT in eval mode, every parameter random (gains around one)."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**{**_HF, **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float("LayerNorm.weight" in key), 0.2)
    return model.to(getattr(torch, dtype))


def inputs() -> dict[str, torch.Tensor]:
    """Tokens of three texts, padded to different lengths, in two segments."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, N_POS, dtype=torch.long)
    mask[0, 7:] = 0
    mask[2, 4:] = 0
    return {
        "input": torch.randint(5, D_VOCAB, (3, N_POS), generator=generator),
        "token_type_ids": (torch.arange(N_POS) > 3).long().repeat(3, 1),
        "one_zero_attention_mask": mask,
    }


def hf_inputs() -> dict[str, torch.Tensor]:
    """`inputs` by transformers' names."""
    tokens, types, mask = inputs().values()
    return {"input_ids": tokens, "token_type_ids": types, "attention_mask": mask}


@functools.cache
def bert_tokenizer() -> Any:
    """A word-piece tokenizer of `VOCAB`."""
    import transformers

    return transformers.BertTokenizer(vocab={word: n for n, word in enumerate(VOCAB)})
