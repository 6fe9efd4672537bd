"""The event loop that answers blocking callers, and the one place that asks where a caller is."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Self, TypeVar
from weakref import WeakSet

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from fractal._threads import Call, ThreadCall, current_thread_call
from fractal.errors import FractalError, InvalidArguments, SyncInAsyncError

__all__ = ["Caller", "LoopBlockedWarning", "Portal", "PortalCall", "call_blocking", "here", "portal", "shared_portal"]

T = TypeVar("T")

logger = logging.getLogger("fractal")

Backend = Literal["asyncio", "trio"]

CLOSE_TIMEOUT = 10.0
"""Seconds that closing a portal waits for what it has cancelled."""


class LoopBlockedWarning(RuntimeWarning):
    """A blocking call was made on a thread whose event loop can do nothing else meanwhile."""


class Portal:
    """An event loop in a thread of its own, started when it is first needed.

    The thread holds the loop from start to end, and calls are handed to it without waiting. That is what makes every
    combination work: AnyIO's own portal, opened by a thread whose own trio loop runs, waits for itself.

    Args:
        backend: `"asyncio"` or `"trio"`.
        use_uvloop: On asyncio, run on uvloop, which must be installed.
    """

    def __init__(self, backend: Backend = "asyncio", *, use_uvloop: bool = False) -> None:
        self.backend: Backend = backend
        self._options: dict[str, Any] = {"use_uvloop": True} if use_uvloop else {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._token: EventLoopToken | None = None
        self._group: TaskGroup | None = None
        self._failure: BaseException | None = None
        self._pid = 0

    def start(self) -> None:
        """Start the event loop, if it does not run yet in this process.

        Raises:
            FractalError: It cannot be started.
        """
        if sys.is_finalizing():
            raise FractalError("the program is ending: there is no event loop any more")
        with self._lock:
            if self._thread is None or self._pid != os.getpid():
                self._ready = threading.Event()
                self._pid, self._token, self._failure = os.getpid(), None, None
                self._thread = threading.Thread(
                    target=self._serve, args=(self._ready,), name=f"fractal portal ({self.backend})", daemon=True
                )
                self._thread.start()
                _running.add(self)
            self._ready.wait()  # also for who comes after a start that Ctrl-C interrupted here
            if self._token is None:
                self._thread = None
                raise FractalError(f"no {self.backend} event loop: {self._failure}") from self._failure

    def spawn(self, call: Call[Any]) -> bool:
        """Run a call as a task, in the caller's context; in the loop's thread.

        Returns:
            Whether there is a loop for it: not if it is closing.
        """
        if self._group is None:
            return False
        self._group.start_soon(call.run)
        return True

    def soon(self, function: Callable[..., object], *arguments: object) -> bool:
        """Have a plain function called in the loop; returns at once.

        Returns:
            Whether the loop took it: not if it has ended.
        """
        token = self._token
        if token is None:
            return False
        try:
            token.backend_class.run_sync_soon(function, arguments, token.native_token)
        except RuntimeError:
            return False
        return True

    @property
    def is_running(self) -> bool:
        """Whether its event loop is there."""
        return self._thread is not None and self._pid == os.getpid()

    def is_this_thread(self) -> bool:
        """Whether the caller is on the portal's own event loop."""
        return self._thread is threading.current_thread() and self._pid == os.getpid()

    def close(self) -> None:
        """Cancel what still runs, wait for it, and end the thread. Does nothing if it does not run."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None or self._pid != os.getpid():
                return
            self.soon(self._stop)
            thread.join(CLOSE_TIMEOUT)

    def _stop(self) -> None:
        if self._group is not None:
            self._group.cancel_scope.cancel()
            self._group = None  # calls that come now are dropped

    def _serve(self, ready: threading.Event) -> None:
        async def hold() -> None:
            async with anyio.create_task_group() as group:
                self._group = group
                self._token = current_token()
                ready.set()
                await anyio.sleep_forever()

        try:
            anyio.run(hold, backend=self.backend, backend_options=self._options)
        except BaseException as error:
            self._failure = error
            if self._token is None:
                return  # `start` tells
            if self._group is not None:
                raise
            # Closing at the interpreter's end: from Python 3.12 on asyncio cannot start the thread in which it shuts
            # down its own pool there. Everything of ours has been closed before.
            logger.debug("the event loop of the %s portal did not close cleanly", self.backend, exc_info=True)
        finally:
            ready.set()


class PortalCall(Call[T]):
    """A call on a portal.

    Args:
        function: What to call in the portal's loop, in the caller's context.
        portal: Where.
    """

    def __init__(self, function: Callable[[], Awaitable[T]], portal: Portal) -> None:
        super().__init__(function)
        self._portal = portal
        self._is_settled = False  # spawned, or never to be; decided in the loop's thread, in the order of the orders

    def start(self) -> Self:
        """Have it run; returns at once."""
        self._portal.start()
        self._settle(start=True)
        return self

    def cancel_from_thread(self) -> None:
        """Have it cancelled, started or not; returns at once, and does nothing if it has ended."""
        self._settle(start=False)

    def _settle(self, *, start: bool) -> None:
        def in_loop() -> None:
            if not self._is_settled:
                self._is_settled = True
                if not (start and self._portal.spawn(self)):
                    self.drop()
            elif not start:
                self.cancel()

        if not self._portal.soon(in_loop) and not self._is_settled:
            self.drop()

    def result_or_cancel(self) -> T:
        """Start it and wait for it, as a caller who lets nothing run on: an interrupted wait cancels it first.

        Raises:
            KeyboardInterrupt: Ctrl-C, after the cleanup; a second one does not wait for it.
        """
        try:
            # Started inside: a Ctrl-C that comes in between finds it, whether the loop has heard of it or not.
            self.start()
            self.wait()
        except BaseException:
            self.cancel_from_thread()
            self.wait()
            raise
        return self.result()


_running: WeakSet[Portal] = WeakSet()
_chosen: ContextVar[Portal | None] = ContextVar("fractal_portal", default=None)
_shared = Portal()


def _start_anew_after_fork() -> None:
    # The thread does not exist in the child, and its lock may have been held.
    global _shared
    _shared = Portal()


if hasattr(os, "register_at_fork"):  # pragma: no branch - there is no such thing on Windows
    os.register_at_fork(after_in_child=_start_anew_after_fork)


@atexit.register
def _close_all() -> None:
    # While threads still run; an interpreter that is being taken apart lets no loop finish.
    for each in list(_running):
        each.close()


@contextmanager
def portal(backend: Backend = "asyncio", *, use_uvloop: bool = False) -> Generator[Portal]:
    """Use an event loop of its own for the blocking calls of a block, in place of the shared one.

    Threads that the block starts use the shared one, unless they are given the context (`contextvars.copy_context`).

    Args:
        backend: `"asyncio"` or `"trio"`.
        use_uvloop: On asyncio, run on uvloop, which must be installed.

    Yields:
        The portal. At the end of the block what still runs on it is cancelled and waited for.

    Raises:
        FractalError: The event loop cannot be started.

    Example:
        ```python
        with sync.portal(backend="trio"):
            result = sync.run(agent, "hello")
        ```
    """
    own = Portal(backend, use_uvloop=use_uvloop)
    own.start()
    token = _chosen.set(own)
    try:
        yield own
    finally:
        _chosen.reset(token)
        own.close()


def shared_portal() -> Portal:
    """The portal of all threads that have not chosen another."""
    return _shared


def here() -> Portal:
    """The portal for the calling thread.

    Raises:
        SyncInAsyncError: The caller is on the portal's own loop and would wait for itself.
    """
    chosen = _chosen.get() or _shared
    if chosen.is_this_thread():
        raise SyncInAsyncError(
            "a blocking call inside the event loop that would have to answer it: await the agent's own verbs here, or"
            " make the tool a plain def, which runs in a worker thread"
        )
    _warn_of_blocked_loop()
    return chosen


def call_blocking(function: Callable[[], Awaitable[T]]) -> T:
    """Call an async function and wait for it, wherever the caller is.

    In a worker thread of a run it joins that run; anywhere else it goes through the portal.
    """
    thread_call = _thread_of_a_run()
    return Caller(thread_call, here() if thread_call is None else None)(function)


class Caller:
    """Calls async functions for a blocking caller, always in the same event loop.

    Args:
        thread_call: The tool call whose worker thread the caller is in, or None.
        portal: Else: the portal.
    """

    def __init__(self, thread_call: ThreadCall[Any] | None, portal: Portal | None) -> None:
        self._thread_call, self._portal = thread_call, portal

    @classmethod
    def here(cls) -> Self:
        """The one for where the caller is now."""
        thread_call = _thread_of_a_run()
        return cls(thread_call, here() if thread_call is None else None)

    def __call__(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call an async function and wait for it."""
        if self._thread_call is not None:
            if self._thread_call.thread is not threading.current_thread():
                raise InvalidArguments("what a plain tool has opened stays in the tool's thread")
            return self._thread_call.join(function)
        assert self._portal is not None
        return PortalCall(function, self._portal).result_or_cancel()


def _thread_of_a_run() -> ThreadCall[Any] | None:
    """The tool call whose worker thread the caller is in, or None."""
    thread_call = current_thread_call.get()
    # The context variable also reaches what the thread starts elsewhere; only the thread itself counts.
    return thread_call if thread_call is not None and thread_call.thread is threading.current_thread() else None


def _warn_of_blocked_loop() -> None:
    try:
        current_token()
    except RuntimeError:
        return
    if _in_ipython():  # a cell cannot do anything else meanwhile, and need not
        return
    warnings.warn(
        "a blocking fractal.sync call on a thread with a running event loop: nothing else on that loop runs until it"
        " returns; await the agent's own verbs instead",
        LoopBlockedWarning,
        stacklevel=5,
    )


def _in_ipython() -> bool:
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
