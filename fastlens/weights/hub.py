"""Fetching a checkpoint from the model hub into its cache, and finding what is there already."""

from pathlib import Path

from fastlens.errors import SourceError
from fastlens.settings import HF_TOKEN
from fastlens.weights.names import unknown_name

_TEXT = ["*.json", "*.txt", "*.model"]
_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"])
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
) -> Path:
    """The folder with config, tokenizer and weights of a repository, safetensors if it has any.

    Files already in the cache are not fetched again. ``token`` defaults to ``HF_TOKEN``.

    Raises: ModelNameError (near names) for a repository that does not exist; SourceError when it is
        gated, has no such revision, or the hub cannot be reached and the cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"{repository!r}" + (f" at revision {revision!r}" if revision else "")
    folder = Path()
    for weights in _WEIGHTS:
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token or HF_TOKEN.get() or None,
                    allow_patterns=[*_TEXT, *weights],
                    ignore_patterns=["*/*"],
                    local_files_only=local_files_only,
                )
            )
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
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{asked} was asked, but the model hub could not be reached, or is switched off "
                f"(HF_HUB_OFFLINE), and the cache has no copy ({type(error).__name__}). Check the "
                f"network, or give a folder that holds the model."
            ) from error
        if any(list(folder.glob(pattern)) for pattern in weights):
            break
    return folder


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
