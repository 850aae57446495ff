"""Short digests that say whether a model is the one an earlier sweep was made with."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fastlens.components.attention import AbstractAttention
from fastlens.config import HookedTransformerConfig
from fastlens.errors import ConfigError, SweepError

# Pieces that have to be copied (strided weights, other devices) need this much memory each.
PIECE_BYTES = 16 * 2**20
MAX_THREADS = 4
DIGITS = 32

# Fields that say where a model came from or where it runs, not what it computes from tokens.
NOT_NUMBERS = frozenset({
    "device", "n_devices", "seed", "model_name", "tokenizer_name", "n_params",
    "init_mode", "init_weights", "initializer_range",
    "original_architecture", "from_checkpoint", "checkpoint_index", "checkpoint_label_type",
    "checkpoint_value", "trust_remote_code", "default_prepend_bos", "tokenizer_prepends_bos",
})  # fmt: skip


def weights_fingerprint(model: nn.Module) -> str:
    """32 hex digits of SHA-256 over the names, shapes, dtypes and bytes of all weights.

    Weights are the parameters and buffers. One changed bit anywhere changes the digest; strides,
    the device, shared storage and the order of registration do not. What a module keeps elsewhere,
    a Python number or a hook, is not seen. Rotary tables, which grow with the longest prompt a
    model has seen, count with the rows they start with.

    Cost: about a second for 1 GB on one core that has SHA instructions, shared by up to four
    threads; at most 64 MB of copies at a time.

    Raises: SweepError for weights that have no bytes to read: on the meta device, sparse, of
        torch's own quantised dtypes, or of a tensor subclass.
    """
    if getattr(model, "streaming", None) is not None:
        return _streamed_fingerprint(model)
    tensors = [(name, _plain_weight(name, tensor)) for name, tensor in sorted(_weights(model))]
    whole = hashlib.sha256(_about([tensor for _, tensor in tensors], [name for name, _ in tensors]))
    pieces = [piece for _, tensor in tensors for piece in _pieces(tensor)]
    if all(piece.device.type == "cpu" for piece in pieces):
        with ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads())) as pool:
            digests = list(pool.map(_digest, pieces))
    else:
        # A thread of its own would not wait for what this one has queued on the device.
        digests = [_digest(piece) for piece in pieces]
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()[:DIGITS]


def _streamed_fingerprint(model: nn.Module) -> str:
    """The same digits, of weights that come when they are read: one layer at a time, as names that
    sort together do."""
    # Of what is away, shape and dtype are known.
    away = sorted(_weights(model), key=lambda item: item[0])
    whole = hashlib.sha256(_about([tensor for _, tensor in away], [name for name, _ in away]))
    rows = {name: len(tensor) for name, tensor in away if tensor.ndim}
    names = [name for name, _ in away]
    # Or layers that are here now would stay.
    del away
    for name in names:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), leaf)
        if name in rows:
            tensor = tensor[: rows[name]]
        for piece in _pieces(_plain_weight(name, tensor)):
            whole.update(_digest(piece))
    return whole.hexdigest()[:DIGITS]


def _about(tensors: Sequence[Tensor], names: Sequence[str]) -> bytes:
    about = [[n, str(t.dtype), list(t.shape)] for n, t in zip(names, tensors, strict=True)]
    return json.dumps(about).encode()


def config_fingerprint(cfg: HookedTransformerConfig) -> str:
    """32 hex digits of SHA-256 over the config's fields that can change a number.

    Left out are where a model runs (device), where it came from (its name, tokenizer, checkpoint)
    and how its weights were drawn (seed, initialisation). ``8`` and ``8.0`` are the same.

    Raises: ConfigError for a field that holds something other than numbers, text, None, a dtype,
        or lists and dicts of these.
    """
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    record = {
        name: _plain_value(name, value) for name, value in fields.items() if name not in NOT_NUMBERS
    }
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, shared ones under each of their names."""
    first_rows: dict[str, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AbstractAttention):
            rows = min(module.cfg.n_ctx, module.ROTARY_INITIAL_CACHE_SIZE)
            prefix = f"{name}." if name else ""
            first_rows |= {f"{prefix}rotary_sin": rows, f"{prefix}rotary_cos": rows}
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer[: first_rows[name]] if name in first_rows else buffer


def _plain_weight(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    kind = type(tensor).__name__
    if tensor.is_meta:
        kind = "tensor on the meta device, which has no values"
    elif tensor.is_quantized:
        kind = f"tensor of dtype {tensor.dtype}"
    elif tensor.layout is not torch.strided:
        kind = f"tensor of layout {tensor.layout}"
    elif type(tensor) is Tensor:
        return tensor
    raise SweepError(
        f"the weights cannot be told from others, so a sweep of this model cannot be resumed: "
        f"{name!r} is a {kind}. Sweep without an output folder and save the scores."
    )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most `PIECE_BYTES`, in order; where they end depends on shape and dtype only."""
    if tensor.numel() * tensor.element_size() <= PIECE_BYTES:
        yield tensor
        return
    row = tensor.numel() // tensor.shape[0] * tensor.element_size()
    if row > PIECE_BYTES:
        for part in tensor:
            yield from _pieces(part)
    else:
        yield from tensor.split(PIECE_BYTES // row)


def _digest(piece: Tensor) -> bytes:
    # A lazily conjugated or negated tensor's bytes are not its values'.
    piece = piece.resolve_conj().resolve_neg().contiguous().cpu()
    # Not `view(-1)`: an axis of one element may keep a stride that no view as bytes takes.
    flat = piece.as_strided((piece.numel(),), (1,))
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain_value(name, item) for key, item in value.items()}
    raise ConfigError(
        f"config field {name}={value!r} cannot be written down, so a sweep of this model cannot be "
        f"resumed. Give numbers, text, None or lists of them."
    )
