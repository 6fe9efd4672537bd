"""Worker threads, from inside of one."""

from __future__ import annotations

import sys
from queue import SimpleQueue
from typing import Any

import pytest
import sniffio

from fractal._concurrency import workers


def test_a_thread_belongs_to_no_event_loop_whether_sniffio_is_loaded_or_not(monkeypatch: pytest.MonkeyPatch):
    token = sniffio.current_async_library_cvar.set("asyncio")
    try:
        with monkeypatch.context() as without:
            without.delitem(sys.modules, "sniffio")
            workers._forget_loop()
        assert sniffio.current_async_library() == "asyncio"
        workers._forget_loop()
        with pytest.raises(sniffio.AsyncLibraryNotFoundError):
            sniffio.current_async_library()
    finally:
        sniffio.current_async_library_cvar.reset(token)


def test_a_thread_that_was_taken_when_its_time_was_over_waits_for_its_work(monkeypatch: pytest.MonkeyPatch):
    class Job:
        has_run = False

        def run(self) -> None:
            self.has_run = True

        def deliver(self) -> None:
            monkeypatch.setattr(workers, "IDLE_TIME", 0.001)  # and then it has been idle for long enough

    class Jobs(SimpleQueue[Any]):
        asked = 0

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            self.asked += 1
            if self.asked == 1:
                raise workers.Empty
            return super().get(block, timeout)

    worker: Any = object.__new__(workers._Worker)
    worker.jobs, job = Jobs(), Job()
    worker.jobs.put(job)
    worker._work()  # not among the idle ones: somebody has taken it, and its work is on the way
    assert job.has_run
    assert worker not in workers._idle
