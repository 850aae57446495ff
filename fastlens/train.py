"""`train`: a plain training loop for language models, with TransformerLens' settings."""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from fastlens.devices import get_device
from fastlens.errors import ConfigError, MissingDependencyError, SourceError, did_you_mean
from fastlens.model.batch_loss import batch_loss
from fastlens.model.streaming import refuse_streamed

_OPTIMIZERS = ("Adam", "AdamW", "SGD")


@dataclass
class HookedTransformerTrainConfig:
    """How `train` trains.

    Args:
        num_epochs: Times the dataset is gone through.
        batch_size: Rows of tokens a step.
        lr: Learning rate.
        seed: Of torch's global generator: the order of the rows.
        momentum: Of SGD.
        max_grad_norm: Gradients with a larger norm are scaled down to it.
        weight_decay: Of AdamW (decoupled, Loshchilov & Hutter 1711.05101) or SGD.
        optimizer_name: ``"Adam"``, ``"AdamW"`` or ``"SGD"``. Either of the first two is AdamW with
            ``weight_decay`` and Adam without.
        device: Where the model is moved; by default a GPU if there is one.
        warmup_steps: The learning rate rises from 0 in so many steps; the first step, at 0,
            changes nothing.
        save_every: A checkpoint after step 0 of each epoch and every so many steps.
        save_dir: The folder of ``model_{step}.pt``. Later epochs overwrite earlier ones' files.
        wandb: Log the loss to Weights and Biases.
        wandb_project_name: By default ``"easy-transformer"``.
        print_every: Print the loss every so many steps; None prints none.
        max_steps: End each epoch after ``max_steps + 1`` steps.
    """

    num_epochs: int
    batch_size: int
    lr: float = 1e-3
    seed: int = 0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    optimizer_name: str = "Adam"
    device: str | torch.device | None = None
    warmup_steps: int = 0
    save_every: int | None = None
    save_dir: str | None = None
    wandb: bool = False
    wandb_project_name: str | None = None
    print_every: int | None = 50
    max_steps: int | None = None


def train(model: Any, config: HookedTransformerTrainConfig, dataset: Dataset) -> Any:
    """Train a model to predict next tokens, in place.

    Seeds torch's global generator. The same seed, data and config give TransformerLens' weights,
    but that padding is left out of the loss (see `fastlens.model.batch_loss`).

    Args:
        config: Not changed.
        dataset: Items with ``"tokens"``, and ``"attention_mask"`` where that says something.

    Returns: the model, in training mode and on ``config.device``; one over several devices stays
        there.

    Raises: ConfigError for a setting out of range, SourceError if ``save_dir`` cannot be
        written, both before the first step; MissingDependencyError if wandb is asked for and not
        installed.
    """
    from tqdm import tqdm

    config = dataclasses.replace(config)
    if config.optimizer_name not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer_name={config.optimizer_name!r} must be one of {_OPTIMIZERS}."
            f"{did_you_mean(config.optimizer_name, _OPTIMIZERS)}"
        )
    for name in ("save_every", "print_every"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1, or None.")
    refuse_streamed(model, "train", "Load the model without them to train it.")
    if config.device is not None and getattr(model, "placement", None) is not None:
        raise ConfigError(
            f"device={config.device!r} was asked of train, but the model's layers lie on several "
            f"devices (device_map or n_devices). Leave device=None: it is trained where it lies."
        )
    folder = _checkpoint_folder(config)
    log = _wandb_log(config) if config.wandb else None
    torch.manual_seed(config.seed)
    model.train()
    # Before the move, as parameters are the same objects after it.
    optimizer = _optimizer(model, config)
    scheduler = None
    if config.warmup_steps > 0:
        warmup_steps = config.warmup_steps
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / warmup_steps))
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True)
    if getattr(model, "placement", None) is None:
        model.to(get_device() if config.device is None else config.device)
    # What an earlier backward left must not become part of the first step.
    optimizer.zero_grad()
    for epoch in tqdm(range(1, config.num_epochs + 1)):
        samples = 0
        for step, batch in tqdm(enumerate(loader)):
            loss = batch_loss(model, batch)
            loss.backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            samples += len(batch["tokens"])
            if log is not None:
                log({"train_loss": loss.item(), "samples": samples, "epoch": epoch})
            if config.print_every is not None and step % config.print_every == 0:
                # TransformerLens prints here.
                print(f"Epoch {epoch} Samples {samples} Step {step} Loss {loss.item()}")  # noqa: T201
            if folder and config.save_every and step % config.save_every == 0:
                _save(model.state_dict(), folder / f"model_{step}.pt")
            if config.max_steps is not None and step >= config.max_steps:
                break
    return model


def _optimizer(model: Any, config: HookedTransformerTrainConfig) -> Optimizer:
    if config.optimizer_name == "SGD":
        decay = config.weight_decay or 0.0
        return SGD(model.parameters(), config.lr, config.momentum, weight_decay=decay)
    if config.weight_decay is None:
        return Adam(model.parameters(), config.lr)
    return AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)


def _wandb_log(config: HookedTransformerTrainConfig) -> Callable[[dict[str, Any]], Any]:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError(
            "wandb=True needs the package wandb, which is not installed: pip install wandb, or "
            "leave wandb off."
        ) from error
    if config.wandb_project_name is None:
        config.wandb_project_name = "easy-transformer"
    wandb.init(project=config.wandb_project_name, config=vars(config))
    return wandb.log


def _checkpoint_folder(config: HookedTransformerTrainConfig) -> Path | None:
    """Made and tried before any work is done that could be lost."""
    if (config.save_every is None) != (config.save_dir is None):
        given, missing = ("save_every", "save_dir")
        if config.save_every is None:
            given, missing = missing, given
        warnings.warn(f"{given} without {missing}: no checkpoint is saved.", stacklevel=3)
    if config.save_every is None or config.save_dir is None:
        return None
    folder = Path(config.save_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SourceError(
            f"save_dir={config.save_dir!r} cannot be written ({error.strerror}). Give another one."
        ) from error
    return folder


def _save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all: the checkpoint that is replaced stays until the new one is written."""
    waiting = path.with_suffix(".part")
    torch.save(state, waiting)
    waiting.replace(path)
