"""Worker threads that no process waits for at its end.

AnyIO's threads on asyncio inherit `daemon` from the thread of the event loop, and serve whoever needs one there. What
hangs in one of the main thread's would keep the process alive. So asyncio gets threads of ours; those of trio are as
they should be.
"""

from __future__ import annotations

import contextvars
import math
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar, checkpoint, current_token

from fractal._concurrency.forks import in_child, our_threads
from fractal._concurrency.loops import call_soon

__all__ = ["THREAD_NAME", "run_in_thread", "wait_out"]

T = TypeVar("T")

THREAD_NAME = "fractal worker thread"
"""Name of those on asyncio."""

IDLE_TIME = 10.0
"""Seconds that a thread waits for its next function."""


async def run_in_thread(function: Callable[[], T], *, abandon: bool) -> T:
    """Call a function in a worker thread.

    Args:
        function: What to call; it runs in a copy of the caller's context, and may use `anyio.from_thread`.
        abandon: Whether a cancelled call returns at once and leaves the thread to itself. If not, it returns when the
            function has, however often it is cancelled.

    Raises:
        Exception: What the function raises.
        RuntimeError: No thread can be started.
    """
    if not _is_on_asyncio():
        return await anyio.to_thread.run_sync(function, abandon_on_cancel=abandon, limiter=_unlimited())
    await checkpoint()  # what has been cancelled by now is not called
    job = _Job(function, anyio.CancelScope())
    with job.scope:
        _start(job)
        await (job.done.wait() if abandon else wait_out(job.done))
    return job.result()


async def wait_out(event: anyio.Event) -> None:
    """Wait for an event, however often the waiting task is cancelled; a cancellation is raised at the end."""
    interrupted: BaseException | None = None
    while not event.is_set():
        try:
            with anyio.CancelScope(shield=True):
                await event.wait()
        except anyio.get_cancelled_exc_class() as error:  # asyncio's own, which no shield keeps out
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _is_on_asyncio() -> bool:
    asyncio: Any = sys.modules.get("asyncio")  # looked up, not imported: if it runs here it is there
    return asyncio is not None and anyio.get_cancelled_exc_class() is asyncio.CancelledError


_no_limit: RunVar[anyio.CapacityLimiter] = RunVar("fractal_no_limit")


def _unlimited() -> anyio.CapacityLimiter:
    """A limiter for AnyIO without a limit: how many threads there may be is decided in the gates."""
    try:
        return _no_limit.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(math.inf)
        _no_limit.set(limiter)
        return limiter


# Private, but only here AnyIO keeps what its `from_thread` asks for.
_of_anyio: Any = import_module("anyio._core._eventloop")


class _Job(Generic[T]):
    """A function and its way through a worker thread, for a task of asyncio's."""

    def __init__(self, function: Callable[[], T], scope: anyio.CancelScope) -> None:
        self.done = anyio.Event()
        self.scope = scope  # where `anyio.from_thread.check_cancelled` looks
        self._function, self._token = function, current_token()
        self._context = contextvars.copy_context()
        self._context.run(_forget_loop)
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Call the function; called in the thread."""
        try:
            with _of_anyio.claim_worker_thread(self._token.backend_class, self._token.native_token):
                _of_anyio.threadlocals.current_cancel_scope = self.scope
                try:
                    self._value.append(self._context.run(self._function))
                finally:
                    del _of_anyio.threadlocals.current_cancel_scope
        except BaseException as error:
            self._error = error

    def deliver(self) -> None:
        """Wake the waiting task; called in the thread."""
        call_soon(self._token, self.done.set)

    def result(self) -> T:
        """Return the function's result, or raise its exception."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._value.pop()
        finally:
            del error  # which refers to this frame


def _forget_loop() -> None:
    # Else a function that runs an event loop of its own would be told that there is one in its thread.
    sniffio: Any = sys.modules.get("sniffio")
    if sniffio is not None:
        sniffio.current_async_library_cvar.set(None)


class _Worker:
    """A thread, with the functions that it is given."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job[Any]] = SimpleQueue()
        thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        our_threads.add(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=IDLE_TIME)
            except Empty:
                with suppress(KeyError):
                    del _idle[self]
                    return
                continue  # taken out of the idle ones: there is something on its way
            job.run()
            _idle[self] = None  # before anybody hears of the end, and needs the next thread
            job.deliver()
            del job


_idle: dict[_Worker, None] = {}


def _start(job: _Job[Any]) -> None:
    try:
        worker, _ = _idle.popitem()  # the one that has waited for the shortest time, so that others may end
    except KeyError:
        worker = _Worker()
    worker.jobs.put(job)


in_child(_idle.clear)
