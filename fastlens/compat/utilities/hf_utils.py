"""Files of the model hub and its cache, and Hugging Face's quirks."""

import errno
import inspect
import json
import logging
import os
import pickle
import random
import shutil
import stat
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from fastlens.errors import SourceError
from fastlens.settings import HF_TOKEN
from fastlens.text_datasets import get_dataset, keep_single_column
from fastlens.weights.hub import hub_errors

__all__ = [
    "CACHE_DIR",
    "call_hf_with_retry",
    "clear_huggingface_cache",
    "download_file_from_hf",
    "enable_hf_numeric_tower",
    "enable_hf_retry",
    "get_dataset",
    "get_hf_token",
    "get_rotary_pct_from_config",
    "keep_single_column",
    "select_compatible_kwargs",
]

CACHE_DIR = HF_HUB_CACHE
_LONGEST_WAIT = 120.0
_WRAPPED = "_fastlens_wrapped"
_log = logging.getLogger(__name__)

T = TypeVar("T")


def get_hf_token() -> str | None:
    """The environment's HF_TOKEN; None where it is not set."""
    return HF_TOKEN.get() or None


def get_rotary_pct_from_config(config: Any) -> float:
    """The share of each head's dimensions that rotate, by a Hugging Face config; 1.0 by default.

    It is ``rotary_pct`` in older configs, ``rope_parameters["partial_rotary_factor"]`` in newer.
    """
    if hasattr(config, "rotary_pct"):
        return config.rotary_pct
    rope = getattr(config, "rope_parameters", None)
    return rope.get("partial_rotary_factor", 1.0) if isinstance(rope, Mapping) else 1.0


def select_compatible_kwargs(
    kwargs_dict: Mapping[str, Any], callable: Callable[..., Any]
) -> dict[str, Any]:
    """The entries that ``callable`` has a parameter for, one that can be given by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(callable).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return {name: value for name, value in kwargs_dict.items() if name in names}


def call_hf_with_retry(
    func: Callable[..., T],
    *args: Any,
    max_attempts: int = 3,
    base_delay: float = 10.0,
    **kwargs: Any,
) -> T:
    """``func(*args, **kwargs)``, again after a while where the hub answers "too many requests".

    The wait is what the answer says (``Retry-After``), else ``base_delay`` seconds, doubled each
    time, 20 % more or less, two minutes at most. Other errors, and the last one, are raised.
    """
    for attempt in range(max(1, max_attempts) - 1):
        try:
            return func(*args, **kwargs)
        except Exception as error:
            response = getattr(error, "response", None)
            if getattr(response, "status_code", None) != 429:
                raise
            wait = _asked_wait(response)
            if wait is None:
                wait = min(base_delay * 2**attempt, _LONGEST_WAIT) * random.uniform(0.8, 1.2)
            _log.warning("the hub answers 'too many requests': next try in %.1f s", wait)
            time.sleep(wait)
    return func(*args, **kwargs)


def _asked_wait(response: Any) -> float | None:
    headers = getattr(response, "headers", None) or {}
    try:
        return max(0.0, float(headers["Retry-After"]))
    except (KeyError, TypeError, ValueError):
        return None


def download_file_from_hf(
    repo_name: str,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str | Path | None = CACHE_DIR,
    force_is_torch: bool = False,
    **kwargs: Any,
) -> Any:
    """A file of the hub: what a ``.pth`` or ``.json`` file holds, the path of any other.

    Args:
        force_is_torch: Read it with torch whatever its name is.
        kwargs: Those of `huggingface_hub.hf_hub_download` (``revision``, ``token``, ...), others
            are not looked at; and ``weights_only=False`` for a torch file that holds more than
            tensors, which runs code that is in it.

    Raises: ModelNameError for a repository that does not exist; SourceError when it cannot be
        reached, has no such file, or a torch file holds more than tensors.
    """
    from huggingface_hub import hf_hub_download

    asked = f"{file_name!r} of {repo_name!r}"
    weights_only = kwargs.pop("weights_only", True)
    with hub_errors(repo_name, asked, instead="a cache_dir that holds it"):
        path = call_hf_with_retry(
            hf_hub_download,
            repo_id=repo_name,
            filename=file_name,
            subfolder=None if subfolder == "." else subfolder,
            cache_dir=cache_dir,
            **select_compatible_kwargs(kwargs, hf_hub_download),
        )
    if path.endswith(".pth") or force_is_torch:
        try:
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"{asked} holds more than tensors, or is no torch file. If you trust it, pass "
                f"weights_only=False: that runs code which is in the file."
            ) from error
    if path.endswith(".json"):
        return json.loads(Path(path).read_text(encoding="utf-8"))
    print("File type not supported:", path.split(".")[-1])
    return path


def clear_huggingface_cache() -> None:
    """Delete the hub's cache, `CACHE_DIR`: every model and dataset that was fetched.

    Files that another process deletes at the same time are no error. Raises: SourceError if
    something cannot be deleted.
    """
    print("Deleting Hugging Face cache directory and all its contents.")
    if not Path(CACHE_DIR).exists():
        return
    handler: dict[str, Any] = {
        "onexc" if sys.version_info >= (3, 12) else "onerror": _on_delete_error
    }
    try:
        shutil.rmtree(CACHE_DIR, **handler)
    except OSError as error:
        raise SourceError(f"not all of {CACHE_DIR} could be deleted: {error}.") from error


def _on_delete_error(function: Callable[[str], Any], path: str, raised: Any) -> None:
    error = raised[1] if isinstance(raised, tuple) else raised
    if isinstance(error, FileNotFoundError) or error.errno == errno.ENOTEMPTY:
        return
    if os.access(path, os.W_OK):
        raise error
    # Windows does not delete what is read-only.
    Path(path).chmod(stat.S_IWUSR)
    function(path)


def enable_hf_retry() -> None:
    """Let transformers' ``Auto*.from_pretrained`` try again as `call_hf_with_retry` does.

    Changes transformers for the whole process, once.
    """
    import transformers

    for name in "AutoConfig AutoModel AutoTokenizer AutoProcessor AutoFeatureExtractor".split():
        cls = getattr(transformers, name)
        if not getattr(cls.from_pretrained, _WRAPPED, False):
            cls.from_pretrained = classmethod(_retried(cls.from_pretrained.__func__))


def _retried(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return call_hf_with_retry(load, cls, *args, **kwargs)

    setattr(from_pretrained, _WRAPPED, True)
    return from_pretrained


def enable_hf_numeric_tower() -> None:
    """Let the hub's typed configs take an int where they want a float (``rope_theta: 10000``).

    Changes huggingface_hub for the whole process, once; does nothing where its parts have moved.
    fastlens reads configs itself and does not need it.
    """
    from huggingface_hub import dataclasses

    check = getattr(dataclasses, "_validate_simple_type", None)
    if check is None or getattr(check, _WRAPPED, False):
        return

    def tolerant(name: str, value: Any, expected_type: type) -> None:
        # Not a bool, which is an int too.
        if not (expected_type is float and type(value) is int):
            check(name, value, expected_type)

    setattr(tolerant, _WRAPPED, True)
    dataclasses._validate_simple_type = tolerant  # type: ignore[attr-defined]
