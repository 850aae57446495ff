"""Tokens' vectors of an embedding or unembedding that is not in memory."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.fold import VOCABULARY_PART, group_of, process_group, vocabulary_mean
from fastlens.weights.source import Source
from fastlens.weights.stream import WeightStream

T = TypeVar("T", bound="_TokenVectors")


class _TokenVectors:
    """What a source holds of single tokens, read while the whole is not in memory."""

    name: str

    def __init__(self, stream: WeightStream, source: Source, flags: Mapping[str, bool]):
        self._group = stream.groups[group_of(self.name)]
        self._source = source
        self._flags = dict(flags)
        self._cfg: HookedTransformerConfig = stream.cfg
        self._dtype = stream.read_as
        self._device = torch.device(self._cfg.device or "cpu")

    @classmethod
    def of(
        cls: type[T], stream: WeightStream, source: Source, flags: Mapping[str, bool]
    ) -> T | None:
        """None where the source cannot give single tokens' numbers."""
        if source.of_tokens(cls.name, torch.zeros(0, dtype=torch.long)) is None:
            return None
        return cls(stream, source, flags)

    def _is_whole(self, tokens: Tensor, n: int) -> bool:
        """Whether the whole is in memory, and to be used.

        Raises: IndexError for tokens that are not below ``n``; EditedError if the whole was written
            to after it had left memory.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < n:
            raise IndexError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())} were given; the "
                f"vocabulary has 0 to {n - 1}."
            )
        self._group.check_away()
        return self._group.is_here

    def _read(self, tokens: Tensor) -> Tensor:
        found = self._source.of_tokens(self.name, tokens, self._dtype)
        assert found is not None
        return found


class EmbeddingRows(_TokenVectors):
    """``W_E[tokens]``, of which only those rows are read.

    All that is done to the embedding when it is loaded is done row by row, so the rows are those
    of the embedding in memory, to the bit.
    """

    name = "embed.W_E"

    def __call__(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Embedding of tokens; None while the whole embedding is in memory.

        Raises: IndexError for a token that is not in the vocabulary; EditedError if the embedding
            was written to after it had left memory.
        """
        if self._is_whole(tokens, self._cfg.d_vocab):
            return None
        wanted, places = tokens.cpu().unique(return_inverse=True)
        with torch.inference_mode(False), torch.no_grad():
            group = {self.name: self._read(wanted)}
            if any(self._flags.values()):
                group = process_group("embed", group, self._cfg, consume=True, **self._flags)
            rows = group[self.name].to(self._device, self._cfg.dtype)
        return rows[places.to(self._device)]


class UnembedColumns(_TokenVectors):
    """Columns of W_U and their biases, of which only those are read.

    They are those of the unembedding in memory, to the bit. Where it is centred over the
    vocabulary, the first call reads all of it once, a part at a time.
    """

    name = "unembed.W_U"

    def __init__(self, stream: WeightStream, source: Source, flags: Mapping[str, bool]):
        super().__init__(stream, source, {**flags, "center_unembed": False})
        self._centred = flags.get("center_unembed", False)
        # What else is in the group: the last norm, the bias.
        self._small: dict[str, Tensor] = {}
        self._mean: Tensor | None = None
        self._bias: Tensor | None = None

    def __call__(
        self, tokens: Int[Tensor, " token"]
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, " token"]] | None:
        """Vectors and biases of tokens; None while the whole unembedding is in memory.

        Raises: as `EmbeddingRows`.
        """
        if self._is_whole(tokens, self._cfg.d_vocab_out):
            return None
        wanted, places = tokens.cpu().unique(return_inverse=True)
        with torch.inference_mode(False), torch.no_grad():
            if self._bias is None:
                self._prepare()
            assert self._bias is not None
            weight, _ = self._part(wanted)
            if self._mean is not None:
                weight = weight - self._mean
            weight, bias = (
                one.to(self._device, self._cfg.dtype)[places.to(self._device)]
                for one in (weight, self._bias[wanted])
            )
        return weight, bias

    def _part(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and biases of rising tokens, before they are centred."""
        group = {name: tensor.clone() for name, tensor in self._small.items()}
        if "unembed.b_U" in group:
            group["unembed.b_U"] = group["unembed.b_U"][tokens]
        group[self.name] = self._read(tokens).t()
        if any(self._flags.values()):
            group = process_group("unembed", group, self._cfg, consume=True, **self._flags)
        bias = group.get("unembed.b_U")
        if bias is None:
            bias = torch.zeros(len(tokens), dtype=self._dtype)
        return group[self.name].t(), bias

    def _prepare(self) -> None:
        """What needs all tokens: the mean over them, and every bias."""
        self._small = self._source.group(
            "unembed", self._cfg, self._dtype, without=frozenset({self.name})
        )
        n = self._cfg.d_vocab_out
        if (
            not self._centred
            and "unembed.b_U" not in self._small
            and "ln_final.b" not in self._small
        ):
            self._bias = torch.zeros(n, dtype=self._dtype)
            return
        biases: list[Tensor] = []

        def parts() -> Iterator[Tensor]:
            for some in torch.arange(n).split(VOCABULARY_PART):
                weight, bias = self._part(some)
                biases.append(bias)
                yield weight.t()

        mean = vocabulary_mean(parts(), n)
        self._bias = torch.cat(biases)
        if self._centred:
            self._mean = mean
            self._bias = self._bias - self._bias.mean(-1, keepdim=True)
