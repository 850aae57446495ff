"""A thread that writes shards while the next forward runs."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType


class Writer:
    """Runs jobs in their order on a thread of its own, a few of them waiting at most.

    >>> with Writer() as writer:
    ...     writer.do(lambda: None)

    A job's error is raised by the next `do`, or at the end of the block; jobs behind it are not
    run. If the block itself fails, waiting jobs are dropped.

    Args:
        waiting: Jobs that may wait; `do` waits for room.
    """

    def __init__(self, waiting: int = 2):
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._drops = False
        self._thread = threading.Thread(target=self._work, name="fastlens-store", daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drops = error is not None
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def do(self, job: Callable[[], object]) -> None:
        """Queue a job.

        Raises: what an earlier job raised.
        """
        self._raise()
        self._jobs.put(job)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is not None or self._drops:
                continue
            try:
                job()
            except BaseException as error:
                self._error = error
