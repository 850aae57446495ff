"""The thread that writes."""

import threading

import pytest

from fastlens.store.writer import Writer


def test_jobs_run_in_order_on_another_thread():
    done = []
    with Writer() as writer:
        for i in range(20):
            writer.do(lambda i=i: done.append((i, threading.current_thread().name)))
    assert done == [(i, "fastlens-store") for i in range(20)]


def test_an_error_surfaces_and_ends_the_jobs():
    done = []

    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), Writer() as writer:
        writer.do(fail)
        for i in range(20):
            writer.do(lambda i=i: done.append(i))
    assert done == []


def test_an_error_of_the_last_job_surfaces():
    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), Writer() as writer:
        writer.do(fail)


def test_a_failed_block_keeps_its_own_error():
    with pytest.raises(KeyError), Writer() as writer:
        writer.do(lambda: None)
        raise KeyError("mine")
