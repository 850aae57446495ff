"""Tokens' vectors of an embedding or unembedding that is not in memory."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.weights.fold import VOCABULARY_PART, process_group, vocabulary_mean
from fastlens.weights.load import HALF
from fastlens.weights.source import Source
from fastlens.weights.stream import StreamedGroup, WeightStream

EMBED, UNEMBED = "embed.W_E", "unembed.W_U"


class EmbeddingRows:
    """``W_E[tokens]``, of which only those rows are read.

    All that is done to the embedding when it is loaded is done row by row, so the rows are those
    of the embedding in memory, to the bit.
    """

    def __init__(
        self,
        group: StreamedGroup,
        source: Source,
        cfg: HookedTransformerConfig,
        flags: Mapping[str, bool],
        device: torch.device,
    ):
        self._group = group
        self._source = source
        self._cfg = cfg
        self._flags = dict(flags)
        self._device = device

    @classmethod
    def of(
        cls,
        stream: WeightStream,
        source: Source,
        cfg: HookedTransformerConfig,
        flags: Mapping[str, bool],
    ) -> "EmbeddingRows | None":
        """None where the source cannot give single rows."""
        rows = source.of_tokens(EMBED, torch.zeros(0, dtype=torch.long))
        if rows is None:
            return None
        return cls(stream.groups["embed"], source, cfg, flags, torch.device(cfg.device or "cpu"))

    def __call__(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Embedding of tokens; None while the whole embedding is in memory.

        Raises: IndexError for a token that is not in the vocabulary.
        """
        if self._group.is_here:
            return None
        _check_tokens(tokens, self._cfg.d_vocab)
        wanted, places = tokens.cpu().unique(return_inverse=True)
        with torch.inference_mode(False), torch.no_grad():
            processed = any(self._flags.values())
            dtype = self._cfg.dtype
            read_as = torch.float32 if dtype in HALF and processed else dtype
            rows = self._source.of_tokens(EMBED, wanted, read_as)
            assert rows is not None
            if processed:
                rows = process_group("embed", {EMBED: rows}, self._cfg, consume=True, **self._flags)
                rows = rows[EMBED]
            rows = rows.to(self._device, dtype)
        return rows[places.to(self._device)]


def _check_tokens(tokens: Tensor, n: int) -> None:
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < n:
        raise IndexError(
            f"tokens from {int(tokens.min())} to {int(tokens.max())} were given; the vocabulary "
            f"has 0 to {n - 1}."
        )


class UnembedColumns:
    """Columns of W_U and their biases, of which only those are read.

    They are those of the unembedding in memory, to the bit. Where it is centred over the
    vocabulary, the first call reads all of it once, a part at a time.
    """

    def __init__(
        self,
        group: StreamedGroup,
        source: Source,
        cfg: HookedTransformerConfig,
        flags: Mapping[str, bool],
    ):
        self._group = group
        self._source = source
        self._cfg = cfg
        self._device = torch.device(cfg.device or "cpu")
        self._centred = flags.get("center_unembed", False)
        self._flags = {**flags, "center_unembed": False}
        processed = any(flags.values())
        self._dtype = torch.float32 if cfg.dtype in HALF and processed else cfg.dtype
        # What else is in the group: the last norm, the bias.
        self._small: dict[str, Tensor] = {}
        self._mean: Tensor | None = None
        self._bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        stream: WeightStream,
        source: Source,
        cfg: HookedTransformerConfig,
        flags: Mapping[str, bool],
    ) -> "UnembedColumns | None":
        """None where the source cannot give single columns."""
        if source.of_tokens(UNEMBED, torch.zeros(0, dtype=torch.long)) is None:
            return None
        return cls(stream.groups["unembed"], source, cfg, flags)

    def __call__(
        self, tokens: Int[Tensor, " token"]
    ) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, " token"]] | None:
        """Vectors and biases of tokens; None while the whole unembedding is in memory."""
        if self._group.is_here:
            return None
        _check_tokens(tokens, self._cfg.d_vocab_out)
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
        vectors = self._source.of_tokens(UNEMBED, tokens, self._dtype)
        assert vectors is not None
        group = {name: tensor.clone() for name, tensor in self._small.items()}
        if "unembed.b_U" in group:
            group["unembed.b_U"] = group["unembed.b_U"][tokens]
        group[UNEMBED] = vectors.t()
        if any(self._flags.values()):
            group = process_group("unembed", group, self._cfg, consume=True, **self._flags)
        bias = group.get("unembed.b_U")
        if bias is None:
            bias = torch.zeros(len(tokens), dtype=self._dtype)
        return group[UNEMBED].t(), bias

    def _prepare(self) -> None:
        """What needs all tokens: the mean over them, and every bias."""
        self._small = self._source.group(
            "unembed", self._cfg, self._dtype, without=frozenset({UNEMBED})
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
