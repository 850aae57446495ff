"""Fetching a checkpoint from the model hub into its cache, and finding what is there already."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlens.errors import FastlensError, SourceError
from fastlens.settings import HF_TOKEN
from fastlens.weights.names import NOT_ON_THE_HUB, unknown_name

_TEXT = ["*.json", "*.txt", "*.model"]
# The last are TransformerLens' own.
_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"], ["*final.pth"])
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model",
)  # fmt: skip


def fetch(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    with_weights: bool = True,
    file: str | None = None,
) -> Path:
    """The folder with config, tokenizer and weights of a repository, safetensors if it has any.

    Files already in the cache are not fetched again. ``token`` defaults to ``HF_TOKEN``.
    ``with_weights=False`` leaves the weights where they are; ``file`` is the one file of weights
    that is wanted, which may lie in a folder of the repository.

    Raises: ModelNameError (near names) for a repository that does not exist; SourceError when it is
        gated, has no such revision, is known not to be on the hub, or the hub cannot be reached and
        the cache has no copy.
    """
    from huggingface_hub import snapshot_download

    if repository in NOT_ON_THE_HUB:
        raise SourceError(
            f"{repository!r} was asked, whose weights are on no hub. Give the folder that holds "
            f"them in transformers' format, or a transformers model: hf_model=."
        )
    asked = f"{repository!r}" + (f" at revision {revision!r}" if revision else "")
    folder = Path()
    wanted = _WEIGHTS if file is None else ([file],)
    for weights in wanted if with_weights else ([],):
        with hub_errors(repository, asked):
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token or HF_TOKEN.get() or None,
                    allow_patterns=[*_TEXT, *weights],
                    ignore_patterns=["*/*"] if file is None else None,
                    local_files_only=local_files_only,
                )
            )
        if any(list(folder.glob(pattern)) for pattern in weights):
            break
    return folder


def listed_files(
    repository: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **_: Any,
) -> list[str]:
    """The files of a repository, which the hub is asked for.

    Raises: as `fetch`.
    """
    from huggingface_hub import HfApi

    with hub_errors(repository, f"the list of files of {repository!r}"):
        token = token or HF_TOKEN.get() or None
        return HfApi().list_repo_files(repository, revision=revision, token=token)


@contextmanager
def hub_errors(
    repository: str, asked: str, instead: str = "a folder that holds the model"
) -> Iterator[None]:
    """What goes wrong with the hub inside, as a fastlens error that says what to do.

    Args:
        asked: What was asked, for the message.
        instead: What one gives instead where there is no network.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except FastlensError:
        raise
    except GatedRepoError as error:
        raise SourceError(
            f"{asked} is gated. Accept its terms on the model's page, then set HF_TOKEN to a "
            f"token of that account."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise unknown_name(
            repository, "the hub has no such repository, or it is private (HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{asked} was asked, but there is no such revision.") from error
    except RemoteEntryNotFoundError as error:
        raise SourceError(f"{asked} was asked, but the repository has no such file.") from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SourceError(
            f"{asked} was asked, but the model hub could not be reached, or is switched off "
            f"(HF_HUB_OFFLINE), and the cache has no copy ({type(error).__name__}). Check the "
            f"network, or give {instead}."
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds tokenizer files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def cached_tokenizer_folder(repository: str, cache_dir: str | Path | None = None) -> Path | None:
    """Where the hub cache has this repository's tokenizer, or None; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in _TOKENIZER_FILES:
        try:
            found = try_to_load_from_cache(repository, name, cache_dir=cache_dir)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None
