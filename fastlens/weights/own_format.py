"""Checkpoints in TransformerLens' own format: its config fields, and ``.pth`` files.

NeelNanda's toy models, Redwood's two-layer model and Othello-GPT are kept so: a ``config.json``
that names sizes as `HookedTransformerConfig` does, among the settings of the training run, the
weights in ``*final.pth``, and those of checkpoints in ``checkpoints/*_{step or tokens}.pth``. Files
are read by torch's restricted unpickler only.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlens.config import HookedTransformerConfig
from fastlens.errors import SourceError
from fastlens.weights.tensor_files import PickleReader, Shape, TensorReader

FINAL = "*final.pth"
CHECKPOINT = re.compile(r"checkpoints/.*_(\d+)\.pth")
# Together they say that a config is TransformerLens', and no other library's.
_ALWAYS = frozenset({"d_model", "n_layers", "d_head", "n_heads", "n_ctx", "d_vocab"})
# Fields that say nothing about what a checkpoint computes.
_OF_THE_RUN = frozenset(
    """device dtype n_devices seed init_mode init_weights initializer_range n_params model_name
    from_checkpoint checkpoint_index checkpoint_label_type checkpoint_value tokenizer_prepends_bos
    use_attn_result use_split_qkv_input use_hook_mlp_in use_attn_in use_hook_tokens
    trust_remote_code load_in_4bit quantization_method""".split()
)
# Beside the fields: what the training code computed with.
_ARITHMETIC = frozenset({"ln_eps", "layer_norm_eps", "normalization", "shortformer_pos",
                         "neuron_scale", "neuron_temp"})  # fmt: skip


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is in TransformerLens' fields."""
    return set(config) >= _ALWAYS and not {"architectures", "model_type"} & set(config)


def as_family_config(config: dict[str, Any], model_name: str) -> dict[str, Any]:
    """A config that a family can read: with its architecture, without settings of the training run.

    Any other library's config is returned as it is.
    """
    if not is_own(config):
        return config
    defaults = {field.name: field.default for field in dataclasses.fields(HookedTransformerConfig)}
    stated = {
        name: value
        for name, value in config.items()
        if name in _ARITHMETIC
        or (name in defaults and name not in _OF_THE_RUN and value != defaults[name])
    }
    old = "neel-solu-old" if "_old" in model_name else "neel"
    return {**stated, "architectures": [config.get("architecture", old)]}


def own_reader(folder: Path, config: dict[str, Any], file: str | None) -> TensorReader:
    """The tensors of a folder, under the names and in the layout of today's TransformerLens.

    ``config`` (of `as_family_config`) is told which biases the file has: the others are zero.

    Args:
        file: A checkpoint's file inside the folder; by default the final weights.

    Raises: SourceError if there is no such file, or it holds more than tensors.
    """
    path = folder / file if file is not None else _final(folder)
    if not path.is_file():
        raise SourceError(f"{path} was asked, but there is no such file.")
    reader: TensorReader = PickleReader([path])
    if config["architectures"] == ["neel-solu-old"]:
        reader = OldLayout(reader, int(config["n_layers"]))
    config["biases"] = biases(reader.shapes)
    return reader


def _final(folder: Path) -> Path:
    found = sorted(folder.glob(FINAL))
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise SourceError(
            f"{folder} has a config of TransformerLens' own format, whose weights are one file "
            f"that ends in final.pth. Found: {names}."
        )
    return found[0]


def biases(names: Iterable[str]) -> list[str]:
    """The kinds of biases among tensors: ``attn.b_Q``, ``mlp.b_in``, ``unembed.b_U``, ..."""
    return sorted(
        {".".join(name.split(".")[-2:]) for name in names if name.split(".")[-1][:2] in ("b", "b_")}
    )


class OldLayout:
    """Tensors of the first SoLU models (``*_old``), under today's names and in today's layout.

    Norms were called ``norm``. With up to 8 layers W_pos was stored transposed, with up to 6 all
    other weight matrices as well (TransformerLens' `convert_neel_solu_old_weights`).
    """

    def __init__(self, reader: TensorReader, n_layers: int):
        self._reader = reader
        self._stored = {self._renamed(name): name for name in reader.shapes}
        self._turned = {
            name
            for name in self._stored
            if "W_" in name and n_layers <= (8 if name.endswith("W_pos") else 6)
        }
        shapes = {name: reader.shapes[stored] for name, stored in self._stored.items()}
        self.shapes: dict[str, Shape] = {
            name: (*shape[:-2], shape[-1], shape[-2]) if name in self._turned else shape
            for name, shape in shapes.items()
        }

    @staticmethod
    def _renamed(name: str) -> str:
        name = name.replace("norm", "ln")
        return name.replace("ln.", "ln_final.") if name.startswith("ln.") else name

    def read(
        self, name: str, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tensor; see `TensorReader.read`."""
        tensor = self._reader.read(self._stored[name], dtype)
        if name in self._turned:
            tensor = tensor.transpose(-2, -1).contiguous()
        return tensor if out is None else out.copy_(tensor)
