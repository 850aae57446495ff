"""Run a check in a process of its own kind: interpreted, compiling, or fresh for each call.

Triton decides at import whether it interprets, and what it interprets it cannot compile; a process
that reads past a guard page dies; a driver is chosen once. Assertions come back as exceptions.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class Died(AssertionError):
    """The process was killed, as by a guard page."""


def _start(interpret: bool, corrected: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if interpret and corrected:
        from tests.gpu import bf16_interpreter

        bf16_interpreter.install()


@functools.cache
def _pool(interpret: bool, corrected: bool) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        1, mp_context=context, initializer=_start, initargs=(interpret, corrected)
    )


def _call(interpret: bool, corrected: bool, check: Callable[..., Any], kwargs: Any) -> Any:
    try:
        return _pool(interpret, corrected).submit(check, **kwargs).result()
    except BrokenProcessPool as error:
        _pool.cache_clear()
        raise Died(f"{check.__name__} killed its process") from error


def interpreted(check: Callable[..., Any], *, corrected: bool = True, **kwargs: Any) -> Any:
    """``check(**kwargs)`` where Triton interprets, with bfloat16 corrected unless said."""
    return _call(True, corrected, check, kwargs)


def compiling(check: Callable[..., Any], **kwargs: Any) -> Any:
    """``check(**kwargs)`` where Triton compiles."""
    return _call(False, False, check, kwargs)


def alone(check: Callable[..., Any], **kwargs: Any) -> Any:
    """The same in a process that does nothing else before or after."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_start, initargs=(False, False)
    ) as pool:
        return pool.submit(check, **kwargs).result()
