"""Checkpoints of training runs: which there are, and where their weights lie."""

from pathlib import Path
from typing import Any, NamedTuple

from fastlens.errors import ModelNameError
from fastlens.weights.family import FAMILIES
from fastlens.weights.hub import listed_files
from fastlens.weights.names import packaged_model, repository_of
from fastlens.weights.own_format import CHECKPOINT

# Toy models count tokens, which are more than any number of steps.
MOST_STEPS = 1e9


class Checkpoint(NamedTuple):
    """One checkpoint.

    Attributes:
        revision: The hub revision that holds it, or None if it is a file of its own.
        file: That file, inside the repository or folder.
        fields: The config fields that record it.
    """

    revision: str | None
    file: str | None
    fields: dict[str, object]


def get_checkpoint_labels(model_name: str | Path, **hub: Any) -> tuple[list[int], str]:
    """The steps or tokens a model was saved at, rising, and which of them they count.

    Args:
        model_name: A hub name, an alias, or a folder in TransformerLens' own format.
        hub: ``revision``, ``token``: for toy models, whose checkpoints are files that are listed.

    Returns: the labels; "step" or "token".
    Raises: ModelNameError (a ValueError) if no list of them is known; SourceError if they must be
        listed and the hub cannot be reached.
    """
    _, files, labels = _found(str(model_name), hub)
    return labels, "token" if files and labels[-1] > MOST_STEPS else "step"


def find_checkpoint(
    model_name: str | Path,
    checkpoint_index: int | None,
    checkpoint_value: int | None,
    **hub: Any,
) -> Checkpoint:
    """Where one training checkpoint is.

    Args:
        model_name: A hub name, an alias, or a folder in TransformerLens' own format.
        checkpoint_index: Place in the list of checkpoints, from the end if negative.
        checkpoint_value: The training step or number of tokens; used where no index is given.
        hub: See `get_checkpoint_labels`.

    Raises: ModelNameError if the model has no known checkpoints, or not that one.
    """
    pattern, files, labels = _found(str(model_name), hub)
    if checkpoint_index is not None:
        if not -len(labels) <= checkpoint_index < len(labels):
            raise ModelNameError(
                f"checkpoint_index={checkpoint_index} was asked, but {model_name} has "
                f"{len(labels)} checkpoints."
            )
        checkpoint_value = labels[checkpoint_index]
    elif checkpoint_value not in labels:
        near = sorted(labels, key=lambda label: abs(label - (checkpoint_value or 0)))[:3]
        raise ModelNameError(
            f"checkpoint_value={checkpoint_value} was asked, but {model_name} has no checkpoint at "
            f"that step. Nearest: {', '.join(map(str, sorted(near)))}."
        )
    assert checkpoint_value is not None
    fields = {
        "from_checkpoint": True,
        "checkpoint_index": labels.index(checkpoint_value),
        "checkpoint_value": checkpoint_value,
        "checkpoint_label_type": "token" if files and labels[-1] > MOST_STEPS else "step",
    }
    if files:
        return Checkpoint(hub.get("revision"), files[checkpoint_value], fields)
    return Checkpoint(pattern.format(checkpoint_value), None, fields)


def _found(name: str, hub: dict[str, Any]) -> tuple[str, dict[int, str], list[int]]:
    """The pattern of revisions, or the files by label; and the labels."""
    folder = Path(name).expanduser()
    files = [path.relative_to(folder).as_posix() for path in folder.glob("checkpoints/*.pth")]
    if files:
        return _of_files(name, files)
    repository = packaged_model(name) or repository_of(name)
    for family in FAMILIES:
        found = family.checkpoints(repository) if family.checkpoints else None
        if found is not None and found[0]:
            return found[0], {}, list(found[1])
        if found is not None:
            return _of_files(repository, listed_files(repository, **hub))
    raise _unknown(name)


def _of_files(name: str, files: list[str]) -> tuple[str, dict[int, str], list[int]]:
    matches = {file: CHECKPOINT.fullmatch(file) for file in files}
    by_label = {int(match[1]): file for file, match in matches.items() if match}
    if not by_label:
        raise _unknown(name)
    return "", by_label, sorted(by_label)


def _unknown(name: str) -> ModelNameError:
    return ModelNameError(
        f"the checkpoints of {name!r} were asked, but no list of its checkpoints is known. Give "
        f"the hub revision that holds one to from_pretrained: revision=."
    )
