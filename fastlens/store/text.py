"""`capture_text`: the activations of a text, into a store."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.errors import ShapeError, SourceError, TokenError
from fastlens.ops.outlier_rows import capture_int8_outliers
from fastlens.store.folder import Entry, Store
from fastlens.store.rows import Texts, batches, digest_of, token_rows
from fastlens.store.shard import digest_of_tensor
from fastlens.store.sites import Site, heads_of, parse_sites
from fastlens.store.writer import Writer

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
INT8 = "int8"
# Beside the sites, in every shard.
TOKENS, ROWS = "tokens", "rows"


def capture_text(
    model: Any,
    texts: Texts,
    sites: str | Sequence[str],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    context: int | None = None,
    batch: int = 8192,
    limit: int | None = None,
    join: bool = True,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> Store:
    """Run a model over texts and keep activations of some places on disk.

    >>> store = capture_text(model, Path("file.txt"), "resid_post:8,pattern:3:[0,5]", "acts")

    Each shard is one batch of rows of one length: entries by hook name (``[row, pos, ...]``),
    ``tokens`` (int32, ``[row, pos]``) and ``rows``, their numbers in the text's order. Nothing is
    padded, so there is no padding in the results. The run ends behind the last layer asked for.
    Shards are written while the next batch runs.

    A killed run goes on from its last whole shard when it is called again with the same arguments;
    on the same machine the files are then those of an unbroken run, byte for byte. The tokens of
    shards that are there already are compared with the text's; their activations are not computed.

    Args:
        model: A `HookedTransformer` with a tokenizer.
        texts: Documents, or files whose lines are documents (`Path`), or a list of either.
        sites: As `parse_sites` reads them.
        out: A new or empty folder, or the one of the same capture.
        dtype: Of activations on disk: ``"bf16"``, ``"fp16"``, ``"fp32"``, a torch dtype, ``"int8"``
            (rows with outliers, see `capture_int8_outliers`), or None for the model's. Entries that
            are no floats stay as they are.
        context: Tokens in a row, BOS included; None for the model's ``n_ctx``, at most 1,024.
        batch: Tokens in a forward, and in a shard.
        limit: Tokens in all.
        join: See `token_rows`.
        prepend_bos: None for the model's default.
        progress: Show a bar of tokens and their rate on stderr.

    Returns: the store, closed for writing.

    Cost: the forwards. Reads texts and weights once before, for the key of the store.
    Raises: SourceError if the folder holds another capture (saying what differs) or the disk fails;
        what was captured before is kept. TokenError without a tokenizer; ShapeError for sites or
        numbers that make no sense.
    """
    chosen = parse_sites(sites, model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokenError("capture_text needs a model with a tokenizer: model.set_tokenizer(...).")
    length = min(model.cfg.n_ctx, 1024) if context is None else context
    if not 1 <= length <= model.cfg.n_ctx or batch < 1 or (limit is not None and limit < 1):
        raise ShapeError(
            f"context={length}, batch={batch}, limit={limit}: context is 1 to the model's "
            f"{model.cfg.n_ctx}, the others at least 1."
        )
    bos = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    kind = checked_dtype(dtype)
    key = {
        "model": model.cfg.model_name,
        "weights": weights_digest(model),
        "texts": digest_of(texts),
        "sites": [str(site) for site in chosen],
        "dtype": str(kind or model.cfg.dtype).removeprefix("torch."),
        "context": length,
        "batch": batch,
        "limit": limit,
        "join": join,
        "prepend_bos": bos,
    }
    rows = token_rows(texts, tokenizer, length, bos, join, limit)
    from tqdm import tqdm

    bar = tqdm(desc="capturing", unit="tok", unit_scale=True, total=limit, disable=not progress)
    with Store.create(out, key) as store, bar:
        there = len(store)
        with Writer() as writer:
            number = -1
            for number, (tokens, numbers) in enumerate(batches(rows, batch)):
                if number < there:
                    _check_tokens(store, number, tokens)
                if number >= there or number in store.torn:
                    entries = run(model, tokens, chosen, kind)
                    entries |= {TOKENS: tokens, ROWS: numbers}
                    if number < there:
                        writer.do(partial(store.restore, number, entries, {}))
                    else:
                        writer.do(partial(store.append, entries))
                bar.update(tokens.numel())
        if number + 1 < there:
            raise SourceError(
                f"{store.path} holds {there} shards, and these texts make {number + 1}: it was "
                f"captured with another tokenizer. Give another folder."
            )
    return store


def run(
    model: Any, tokens: Tensor, sites: Sequence[Site], dtype: torch.dtype | str | None
) -> dict[str, Entry]:
    """The activations of one batch, as they are stored. Stops behind the last layer asked for."""
    layers = [site.layer for site in sites]
    options: dict[str, Any] = {}
    if None not in layers:
        options["stop_at_layer"] = max(layer for layer in layers if layer is not None) + 1
    names = [site.name for site in sites]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens.to(model.cfg.device, torch.long),
            names_filter=names,
            heads=heads_of(sites, model),
            return_type=None,
            return_cache_object=False,
            **options,
        )
        return {name: _stored(cache[name], dtype) for name in names}


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    """The number type of that name.

    Raises: ShapeError for one that a capture cannot have.
    """
    if dtype is None or dtype == INT8:
        return dtype
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or not found.is_floating_point:
        raise ShapeError(f"dtype {dtype!r}: activations are kept as {', '.join([*DTYPES, INT8])}.")
    return found


def weights_digest(model: Any) -> str:
    """Of all parameters, buffers and the config; of a streamed model, one layer after the other.

    Reads every weight once.
    """
    whole = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.cfg.to_dict().items() if k not in ("device", "n_devices")}
    whole.update(json.dumps(config, sort_keys=True, default=str).encode())
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = sorted(named)
    whole.update(
        json.dumps([[n, str(named[n].dtype), list(named[n].shape)] for n in names]).encode()
    )
    # What is listed of a streamed model need not be in memory, and what is would stay there.
    del named

    def digest(name: str) -> bytes:
        path, _, leaf = name.rpartition(".")
        return _digest_as_it_lies(getattr(model.get_submodule(path), leaf))

    if getattr(model, "streaming", None) is not None:
        digests = list(map(digest, names))
    else:
        # Hashing lets go of the interpreter; processors have instructions for this one.
        with ThreadPoolExecutor(2) as pool:
            digests = list(pool.map(digest, names))
    for one in digests:
        whole.update(one)
    return whole.hexdigest()


def _digest_as_it_lies(tensor: Tensor) -> bytes:
    """Of a tensor's numbers in the order of memory, which is part of it: nothing is transposed."""
    tensor = tensor.detach().cpu()
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    flat = tensor.permute(order).contiguous().reshape(-1)
    found = hashlib.sha256(str(order).encode())
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()


def _stored(entry: Tensor, dtype: torch.dtype | str | None) -> Entry:
    if not entry.is_floating_point() or dtype is None:
        return entry
    if isinstance(dtype, str):
        return capture_int8_outliers(entry)
    return entry.to(dtype)


def _check_tokens(store: Store, number: int, tokens: Tensor) -> None:
    if store.shards[number].places[TOKENS].digest != digest_of_tensor(tokens):
        raise SourceError(
            f"{store.shards[number].path} was captured of other tokens than these texts have now: "
            f"another tokenizer? Give another folder."
        )
