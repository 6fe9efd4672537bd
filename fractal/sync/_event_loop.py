"""One event loop in a thread of its own, from its start to its end, and the calls that other threads make on it."""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, Literal, Protocol, Self, TypeVar
from weakref import WeakSet

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import EventLoopToken, current_token

from fractal._concurrency.crossing import Latch, LoopCall
from fractal._concurrency.forks import end_child_with_this_step, in_child, our_threads
from fractal._concurrency.loops import call_soon
from fractal._concurrency.stuck import line_in_thread, line_of
from fractal._concurrency.threads import ThreadCall, current_thread_call, threads_waited_for
from fractal._engine.below import Errand
from fractal._log import log
from fractal._texts import is_a, repr_of, said_by
from fractal.errors import FractalError, OtherProcess, RunCancelled, SyncInAsyncError
from fractal.sync._garbage import is_collecting

__all__ = ["Backend", "EventLoop", "PortalCall"]

T = TypeVar("T")

Backend = Literal["asyncio", "trio"]

CLOSE_TIMEOUT = 10.0
"""Seconds after which it is told what goes on in an event loop that was to end."""

MOMENT = 0.1
"""Seconds that an interrupted wait leaves for the end before it tells what goes on."""

_loops: WeakSet[EventLoop] = WeakSet()


class EventLoop:
    """An event loop in a thread of its own.

    The thread holds the loop from start to end, and calls are handed to it without waiting. That is what makes every
    combination work: AnyIO's own portal, opened by a thread whose own trio loop runs, waits for itself.

    No lock is held in any of this: a signal handler may come at any moment, and make calls too.

    Args:
        backend: `"asyncio"` or `"trio"`.
        use_uvloop: On asyncio, run on uvloop, which must be installed.
    """

    def __init__(self, backend: Backend, *, use_uvloop: bool) -> None:
        self.backend: Backend = backend
        self._use_uvloop = use_uvloop
        self._thread = threading.Thread(target=self._serve, name=f"fractal portal ({backend})", daemon=True)
        self._ready, self._over = Latch(), Latch()
        self._calls: set[PortalCall[Any]] = set()  # those that have not ended
        self._token: EventLoopToken | None = None
        self._group: TaskGroup | None = None  # while calls are begun
        self._is_ending = False  # as somebody has asked for
        self._failure: BaseException | None = None
        self._parent: int | None = None  # in a forked child: the process in which it runs

    # ---- from any thread

    def start(self) -> None:
        """Start the event loop, and wait until it runs.

        Raises:
            FractalError: It cannot be started.
        """
        _loops.add(self)
        our_threads.add(self._thread)
        try:
            self._thread.start()
        except Exception as error:
            if is_a(error.__context__, KeyboardInterrupt):  # and the lock that it has left in disorder
                raise error.__context__ from None
            if self._thread.ident is not None or not is_a(error, (RuntimeError, MemoryError)):
                raise  # a signal handler's own
            # There is no thread left, or no memory.
            raise FractalError(f"no {self.backend} event loop: {said_by(error)}") from error
        self._ready.wait()
        if self._token is None:
            raise FractalError(f"no {self.backend} event loop: {repr_of(self._failure)}") from self._failure

    @property
    def is_over(self) -> bool:
        """Whether the event loop has ended, or is in another process."""
        return self._over.is_open

    @property
    def takes_calls(self) -> bool:
        """Whether a call that comes now would be started."""
        return self._group is not None and not self._is_ending and not self._over.is_open

    def is_this_thread(self) -> bool:
        """Whether the caller is in the thread of the event loop."""
        return self._thread is threading.current_thread() and self._parent is None

    def running(self) -> Self:
        """The event loop itself, for a call that must run in no other.

        Raises:
            OtherProcess: It runs in the parent of this process.
            RunCancelled: It has ended, or is about to.
        """
        if self._parent is not None:
            raise OtherProcess(self._parent)
        if not self.takes_calls:
            raise self._why()
        return self

    def begin(self, call: PortalCall[Any]) -> None:
        """Run a call as a task, in the caller's context; returns at once."""
        self._order(self._begin, call)

    def cancel(self, call: PortalCall[Any]) -> None:
        """Cancel a call, started or not; returns at once, and does nothing if it has ended."""
        self._order(self._cancel, call)

    def ask_to_end(self) -> None:
        """Cancel all calls, and end; returns at once."""
        self._is_ending = True
        self._soon(self._stop)

    def end(self, until: float | None = None) -> None:
        """Cancel all calls, wait for them, and end the thread; those that do not end in time are named in the log.

        Tools that are to be waited for (`on_cancel="wait"`) are, as long as it takes.

        Args:
            until: When the rest is waited for no longer, on `time.monotonic()`'s clock. None: in `CLOSE_TIMEOUT`.
        """
        self.ask_to_end()
        if self._would_wait_for_itself() or not self._thread.is_alive():  # Ctrl-C came before there was one
            return
        try:
            self._wait_for_end(time.monotonic() + CLOSE_TIMEOUT if until is None else until)
        except BaseException:  # Ctrl-C
            if not self._over.wait(MOMENT):
                self._tell_what_goes_on("nobody waits for it any more")
            raise

    def _order(self, function: Callable[[PortalCall[Any]], None], call: PortalCall[Any]) -> None:
        # Noted first, and asked for the end last: so either the loop hears of the call, or somebody sees it at the end.
        self._calls.add(call)
        self._soon(function, call)
        if self.is_over:
            self._end_calls()

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        if self._token is not None and self._parent is None:
            call_soon(self._token, function, *arguments)

    def _end_calls(self) -> None:
        with suppress(KeyError):  # somebody else has taken the last one
            while self._calls:
                self._refuse(self._calls.pop())

    def _refuse(self, call: PortalCall[Any]) -> None:
        if call.has_begun or self._is_ending:
            call.drop(self._why())
        else:  # nothing of it has happened: it is for the loop that comes after this one
            call.start_anew()

    def _why(self) -> RunCancelled:
        why = f": {repr_of(self._failure)}" if self._failure is not None else ""
        error = RunCancelled(f"the event loop that ran this has ended{why}")
        error.__cause__ = self._failure
        return error

    # ---- the end

    def _would_wait_for_itself(self) -> bool:
        call = current_thread_call.get()
        is_waited_for = call is not None and call.is_here and not call.abandon and self._is_mine(call.token)
        return self.is_this_thread() or is_waited_for or is_collecting()

    def _is_mine(self, token: EventLoopToken | None) -> bool:
        return token is not None and self._token is not None and token.native_token is self._token.native_token

    def _wait_for_end(self, until: float) -> None:
        is_logged = was_waited_for = False
        while not self._over.wait(max(until - time.monotonic(), 0.0)):
            is_waited_for = bool(self._threads_waited_for())
            if not (is_waited_for or was_waited_for):
                self._tell_what_goes_on("it is left to itself")
                return
            if not is_logged:
                self._tell_what_goes_on("it is waited for")
            is_logged, was_waited_for = True, is_waited_for  # then the rest has its time once more
            until = time.monotonic() + CLOSE_TIMEOUT
        self._thread.join()

    def _threads_waited_for(self) -> list[ThreadCall[Any]]:
        return [] if self._token is None else threads_waited_for(self._token)

    def _tell_what_goes_on(self, then: str) -> None:
        found = self._what_goes_on()
        if not self.is_over:
            log.warning(f"a portal on {self.backend} is closed, and what ran on it goes on: {found}; {then}")

    def _what_goes_on(self) -> str:
        found: list[str] = []
        looked = Latch()

        def look() -> None:
            for task in anyio.get_running_tasks():
                line = line_of(task.coro)
                if line is not None:
                    found.append(f"{task.name} at {line}")
            looked.open()

        self._soon(look)
        until = time.monotonic() + 1.0
        while not (looked.wait(0.02) or self.is_over or time.monotonic() > until):
            pass
        if not (looked.is_open or self.is_over):
            return f"the event loop is blocked at {line_in_thread(self._thread) or 'a place unknown'}"
        for call in self._threads_waited_for():
            assert call.thread is not None
            found.append(f"{call.name} at {line_in_thread(call.thread) or 'a place unknown'}")
        return ", ".join(found) or "something that cannot be named"

    def forget_parent(self) -> None:
        """Mark the event loop as past: this process is a fork of the one in which it runs."""
        if self.is_over:
            return
        if self.is_this_thread():
            end_child_with_this_step()
        self._parent = os.getppid()
        self._over.open()
        for call in list(self._calls):
            call.drop(OtherProcess(self._parent))

    # ---- in the loop's thread

    def _serve(self) -> None:
        options = {} if self.backend == "trio" else {"loop_factory": self._make_loop}
        try:
            anyio.run(self._hold, backend=self.backend, backend_options=options)
        except BaseException as error:
            self._failure = error
        if self._is_ending:
            # At the interpreter's end: from Python 3.12 on asyncio cannot start the thread in which it shuts down its
            # own pool there. Everything of ours has been closed before.
            if self._failure is not None:
                log.debug(f"an event loop of {self.backend} did not close cleanly", self._failure)
        elif self._token is not None:
            log.warning(f"the {self.backend} event loop of a portal has ended: {repr_of(self._failure)}")
        self._over.open()
        self._end_calls()
        self._ready.open()

    def _make_loop(self) -> Any:
        """An event loop of asyncio's that only ends on request: not by a task's exception, nor by its own `stop`."""
        loop = import_module("uvloop" if self._use_uvloop else "asyncio").new_event_loop()
        loop.run_forever = partial(self._run_on, loop.run_forever)
        return loop

    def _run_on(self, run_forever: Callable[[], None]) -> None:
        while True:
            try:
                run_forever()
            except (KeyboardInterrupt, SystemExit) as error:
                # Whoever waits for the task that raised it is told; what runs beside it has nothing to do with that.
                if self._group is None:
                    raise
                log.debug("raised in a task of a portal", error)
            if self._group is None:
                return

    async def _hold(self) -> None:
        async with anyio.create_task_group() as group:
            self._group, self._token = group, current_token()
            self._ready.open()
            if self._is_ending:  # it was asked to before there was anybody to hear of it
                self._stop()
            try:
                while True:
                    await self._wait_for_cancellation()
            finally:
                self._group = None  # calls that come now are not begun

    async def _wait_for_cancellation(self) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            if anyio.current_effective_deadline() == -math.inf:
                raise
            # Natively: somebody has cancelled all tasks of the loop, and this one runs for others.
            sys.modules["asyncio"].current_task().uncancel()

    def _stop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.cancel_scope.cancel()

    def _begin(self, call: PortalCall[Any]) -> None:
        if call.has_ended:
            self._calls.discard(call)
        elif self._group is None:
            self._calls.discard(call)
            self._refuse(call)
        else:
            call.has_begun = True
            self._group.start_soon(self._run, call)

    async def _run(self, call: PortalCall[Any]) -> None:
        # One that is cancelled natively must not take the others with it; who waits for it is told.
        with suppress(anyio.get_cancelled_exc_class()):
            await call.run()
        self._calls.discard(call)

    def _cancel(self, call: PortalCall[Any]) -> None:
        if call.has_begun:
            call.cancel()
        else:
            call.drop(RunCancelled())
        if call.has_ended:
            self._calls.discard(call)


class Runner(Protocol):
    """An object that chooses the event loop for a call."""

    def running(self) -> EventLoop:
        """The event loop, started if need be.

        Raises:
            FractalError: There is none.
        """
        ...


class PortalCall(LoopCall[T]):
    """A call on a portal.

    Args:
        function: What to call in the portal's loop, in the caller's context.
        portal: Where: a portal, or one event loop of it.
    """

    def __init__(self, function: Callable[[], Awaitable[T]], portal: Runner) -> None:
        super().__init__(function)
        self.has_begun = False  # decided in the loop's thread
        self._portal = portal
        self._loop: EventLoop | None = None
        self._errand: Errand | None = None  # of the run that the caller's thread works for

    def start(self) -> Self:
        """Start the call; returns at once.

        Raises:
            FractalError: There is no event loop.
        """
        self._loop = self._portal.running()
        self._errand = self._errand or Errand.begun_here(self.cancel_from_thread)
        if self._errand is not None and self.has_ended:  # cancelled by the run in this moment, before it was ours
            self._errand.over()
        self._loop.begin(self)
        return self

    def start_anew(self) -> None:
        """Start the call in the portal's next event loop."""
        try:
            self.start()
        except FractalError as error:
            self.drop(error)

    def cancel_from_thread(self) -> None:
        """Cancel the call, started or not; returns at once, and does nothing if it has ended."""
        if self._loop is None:
            self.drop(RunCancelled())
        elif not self.has_ended:
            self._loop.cancel(self)

    def _end(self, error: BaseException | None) -> None:
        super()._end(error)
        if self._errand is not None:
            self._errand.over()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, in another thread than the event loop's, for the end of the call, cleanup included.

        Raises:
            SyncInAsyncError: The caller is in the event loop that would have to end it.
        """
        if timeout != 0 and not self.has_ended and self._loop is not None and self._loop.is_this_thread():
            raise SyncInAsyncError("it is waited for in the event loop that runs it: wait for it in another thread")
        return super().wait(timeout)

    def result_or_cancel(self) -> T:
        """Start the call and wait for it; an interrupted wait cancels the call, and waits for that.

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


@atexit.register
def _end_all() -> None:
    # While threads still run; an interpreter that is being taken apart lets no loop finish.
    loops = [loop for loop in list(_loops) if not loop.is_over]
    for loop in loops:
        loop.ask_to_end()
    until = time.monotonic() + CLOSE_TIMEOUT
    for loop in loops:
        loop.end(until)


@in_child
def _forget_loops() -> None:
    for loop in list(_loops):
        loop.forget_parent()
