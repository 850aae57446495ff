"""Load a model for a command, with a clock on stderr if it takes long."""

from pathlib import Path
from typing import Any

from fastlens.cli.options import Dtype
from fastlens.cli.output import waiting


def load_model(
    name: str,
    *,
    processing: bool = True,
    device: str | None = None,
    dtype: Dtype = Dtype.float32,
) -> Any:
    """The `HookedTransformer` of that name, folder or file.

    Raises: ModelNameError, SourceError, ... as `HookedTransformer.from_pretrained`; OptionError
        for a device that is not here.
    """
    import torch

    from fastlens import HookedTransformer

    checked_device(device)
    load = (
        HookedTransformer.from_pretrained
        if processing
        else HookedTransformer.from_pretrained_no_processing
    )
    with waiting(f"loading {name}"):
        return load(name, device=device, dtype=getattr(torch, dtype.value), verbose=False)


def checked_device(name: str | None) -> None:
    """Raise OptionError for a device that torch does not know or that is not in this machine."""
    import torch

    from fastlens.cli.options import OptionError

    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"--device {name} cannot be used here: {reason}") from error


def described(model: Any) -> str:
    """One line: which model, its size, number type and device."""
    cfg = model.cfg
    dtype = str(cfg.dtype).removeprefix("torch.")
    return (
        f"{cfg.model_name}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
        f"{dtype} on {cfg.device}"
    )


def writable(out: Path | None) -> Path | None:
    """The folder, made and tried, so that an unwritable one is reported before any work.

    Raises: SourceError if nothing can be written there.
    """
    from fastlens.scores import writable_folder

    return None if out is None else writable_folder(out)
