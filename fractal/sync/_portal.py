"""The event loop that answers blocking callers, and the one place that asks where a caller is."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, Self, TypeVar
from weakref import WeakSet

from anyio.lowlevel import current_token

from fractal._concurrency.forks import in_child, loop_of_fork
from fractal._concurrency.threads import JoinedCall, ThreadCall, current_thread_call
from fractal._log import level_of_caller
from fractal.errors import FractalError, InvalidArguments, PortalClosed, RunCancelled, SyncInAsyncError
from fractal.sync._event_loop import Backend, EventLoop, PortalCall
from fractal.sync._garbage import is_collecting

__all__ = [
    "Caller",
    "LoopBlockedWarning",
    "Portal",
    "PortalCall",
    "call_blocking",
    "here",
    "portal",
    "shared_portal",
    "thread_of_a_run",
]

T = TypeVar("T")


class LoopBlockedWarning(RuntimeWarning):
    """A blocking call was made on a thread whose event loop can do nothing else meanwhile."""


_portals: WeakSet[Portal] = WeakSet()


class Portal:
    """An event loop in a thread of its own, started on demand, and again after it has ended.

    It ends when it is closed, or nobody has the portal any more.

    Args:
        backend: `"asyncio"` or `"trio"`.
        use_uvloop: On asyncio, run on uvloop, which must be installed.
    """

    _loop: EventLoop | None = None

    def __init__(self, backend: Backend = "asyncio", *, use_uvloop: bool = False) -> None:
        self.backend: Backend = backend
        self._use_uvloop = use_uvloop
        # One that a signal handler, which may interrupt who holds it, can have as well.
        self._starting = threading.RLock()
        self._is_left = False
        _portals.add(self)

    def start(self) -> None:
        """Start the event loop, unless it runs in this process already.

        Raises:
            FractalError: It cannot be started.
            PortalClosed: The portal's block has been left.
        """
        self.running()

    def running(self) -> EventLoop:
        """The event loop, started if need be.

        Raises:
            FractalError: It cannot be started.
            PortalClosed: The portal's block has been left.
        """
        loop = self._loop
        if loop is not None and loop.takes_calls:
            return loop
        if self._is_left:
            raise PortalClosed(self.backend)
        if sys.is_finalizing():
            raise FractalError("the program is ending: there is no event loop any more")
        with self._starting:
            return self._started()

    def _started(self) -> EventLoop:
        if self._loop is not None and self._loop.takes_calls:
            return self._loop
        fresh = EventLoop(self.backend, use_uvloop=self._use_uvloop)
        try:
            fresh.start()
            quicker = self._loop
            if quicker is not None and quicker.takes_calls:  # started by a signal handler meanwhile
                fresh.ask_to_end()
                return quicker
            self._loop = fresh
            if self._is_left:
                raise PortalClosed(self.backend)
        except BaseException:
            fresh.ask_to_end()
            raise
        return fresh

    @property
    def is_running(self) -> bool:
        """Whether the event loop runs."""
        return self._loop is not None and not self._loop.is_over

    @property
    def is_left(self) -> bool:
        """Whether the portal's block has been left, so that it starts no more."""
        return self._is_left

    def is_this_thread(self) -> bool:
        """Whether the caller is on the portal's own event loop."""
        return self._loop is not None and self._loop.is_this_thread()

    def close(self) -> None:
        """Cancel the calls that still run, wait for them, and end the thread; does nothing without one.

        What does not end within 10 s is named in the log and left to itself; but a tool with `on_cancel="wait"` is
        waited for, as long as it takes. In the portal's own event loop, and in the garbage collector, nothing is waited
        for.
        """
        if self._loop is not None:
            self._loop.end()

    def __del__(self) -> None:
        self.leave(wait=False)  # nobody has it any more who could close it

    def leave(self, *, wait: bool = True) -> None:
        """Close the portal for good.

        Args:
            wait: Whether to wait for the end, as `close` does.
        """
        self._is_left = True
        loop = self._loop
        if loop is not None and not loop.is_over:
            loop.end() if wait else loop.ask_to_end()

    def forget_parent(self) -> None:
        """Reset the portal: this process is a fork of the one in which its event loop runs."""
        self._starting = threading.RLock()
        self._loop = None


_shared = Portal()


@in_child
def _start_anew() -> None:
    for each in list(_portals):
        each.forget_parent()


# ---- which portal


class _Choice:
    """The portal that a block has chosen, and the context in which the block was entered."""

    def __init__(self, portal: Portal) -> None:
        self.portal, self.outer = portal, _chosen.get()
        # Whether the block was left in another context than it was entered in, which chooses it still.
        self.is_astray = False
        self._token: Token[_Choice | None] | None = None

    def make(self) -> None:
        """Set the portal in the context."""
        self._token = _chosen.set(self)

    def undo(self) -> bool:
        """Restore the former portal; only possible in the context of the block."""
        if self._token is None:  # Ctrl-C has come in the moment in which it was chosen, or before
            _chosen.set(self.outer)
            return True
        with suppress(ValueError, RuntimeError):
            _chosen.reset(self._token)
            return True
        return False


class _Block:
    """The end of a portal's block, which must happen even if Ctrl-C comes while the block is left."""

    _is_left = True

    def __init__(self, portal: Portal) -> None:
        self._portal, self.choice = portal, _Choice(portal)
        self._is_left = self._is_undone = False

    def leave(self) -> None:
        """End the portal, and wait for its end."""
        # Undone first: a signal handler that comes while the portal ends makes its calls on the former one.
        self._undo()
        self._portal.leave()
        self._is_left = True

    def _undo(self) -> None:
        self.choice.is_astray = not self.choice.undo()
        self._is_undone = True

    def __del__(self) -> None:
        if not self._is_left:
            self._portal.leave(wait=False)
            if not self._is_undone:
                self._undo()


_chosen: ContextVar[_Choice | None] = ContextVar("fractal_portal", default=None)


@contextmanager
def portal(backend: Backend = "asyncio", *, use_uvloop: bool = False) -> Generator[Portal]:
    """A block whose blocking calls use an event loop of their own, in place of the shared one.

    Threads that the block starts use the shared one, unless they are given the context (`contextvars.copy_context`).

    Args:
        backend: `"asyncio"` or `"trio"`.
        use_uvloop: On asyncio, run on uvloop, which must be installed.

    Yields:
        The portal. At the end of the block what still runs on it is cancelled and waited for, as `Portal.close` says.

    Raises:
        FractalError: The event loop cannot be started.

    Example:
        ```python
        with sync.portal(backend="trio"):
            result = sync.run(agent, "hello")
        ```
    """
    own = Portal(backend, use_uvloop=use_uvloop)
    block = _Block(own)
    try:
        own.start()
        block.choice.make()
        yield own
    finally:
        block.leave()


def shared_portal() -> Portal:
    """The portal of all threads that have not chosen another."""
    return _shared


def _portal_of_context() -> Portal:
    choice = _chosen.get()
    while choice is not None and choice.portal.is_left:
        # One that was left as it was entered is chosen in copies only, which were made to use it.
        if not choice.undo() and not choice.is_astray:
            raise PortalClosed(choice.portal.backend)
        choice = choice.outer
    return choice.portal if choice is not None else _shared


def here() -> Portal:
    """The portal for the calling thread.

    Raises:
        SyncInAsyncError: The caller is on the portal's own loop and would wait for itself.
        PortalClosed: The caller's context is a copy of one inside of a portal's block, which has been left.
    """
    chosen = _portal_of_context()
    if chosen.is_this_thread():
        raise SyncInAsyncError(
            "a blocking call inside the event loop that would have to answer it: await the agent's own verbs here, or"
            " make the tool a plain def, which runs in a worker thread"
        )
    _warn_of_blocked_loop()
    return chosen


# ---- calls


def call_blocking(function: Callable[[], Awaitable[T]]) -> T:
    """Call an async function and wait for it, wherever the caller is.

    In a worker thread of a run it joins that run; anywhere else it goes through the portal.
    """
    thread_call = thread_of_a_run()
    if thread_call is not None:
        return thread_call.join(function)
    return PortalCall(function, here()).result_or_cancel()


class Caller:
    """A caller of async functions from blocking code, always in the same event loop.

    Args:
        thread_call: The tool call whose worker thread the caller is in, or None.
        loop: Else: the event loop.
    """

    def __init__(self, thread_call: ThreadCall[Any] | None, loop: EventLoop | None) -> None:
        self._thread_call, self._loop = thread_call, loop

    @classmethod
    def here(cls) -> Self:
        """The caller for the current thread.

        Raises:
            FractalError: There is no event loop.
        """
        thread_call = thread_of_a_run()
        return cls(thread_call, here().running() if thread_call is None else None)

    def __call__(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call an async function and wait for it."""
        if self._thread_call is not None:
            self._require_own_thread()
            return self._thread_call.join(function)
        assert self._loop is not None
        return PortalCall(function, self._loop).result_or_cancel()

    def call(self, function: Callable[[], Awaitable[T]]) -> JoinedCall[T] | PortalCall[T]:
        """A call that can be started and is not waited for."""
        if self._thread_call is not None:
            return self._thread_call.call(function)
        assert self._loop is not None
        return PortalCall(function, self._loop)

    def end(self, function: Callable[[], Awaitable[object]]) -> None:
        """Call an async function that ends something, unless the end of the event loop has ended that already.

        Where the caller must not wait, in the garbage collector say, this returns at once.
        """
        if self.is_over:
            return
        try:
            self.call(function).start() if self.must_not_wait else self(function)
        except RunCancelled:
            if not self.is_over:  # pragma: no branch - it may end in this moment, which no test can choose
                raise

    @property
    def is_over(self) -> bool:
        """Whether the event loop has ended, or is in another process."""
        if self._thread_call is not None:
            return self._thread_call.is_over
        assert self._loop is not None
        return not self._loop.takes_calls

    @property
    def must_not_wait(self) -> bool:
        """Whether the caller is in the event loop, or in the garbage collector, and would block others by waiting."""
        return is_collecting() or (self._loop is not None and self._loop.is_this_thread())

    def _require_own_thread(self) -> None:
        assert self._thread_call is not None
        if self._thread_call.thread is not threading.current_thread():
            raise InvalidArguments("what a plain tool has opened stays in the tool's thread")


def thread_of_a_run() -> ThreadCall[Any] | None:
    """The tool call whose worker thread the caller is in, or None."""
    thread_call = current_thread_call.get()
    # The context variable also reaches what the thread starts elsewhere; only the thread itself counts.
    return thread_call if thread_call is not None and thread_call.is_here else None


def _warn_of_blocked_loop() -> None:
    try:
        token = current_token()
    except RuntimeError:
        return
    parents = loop_of_fork()  # trio does not notice that it is none of this process
    is_parents = parents is not None and parents.native_token is token.native_token
    if is_parents or _in_ipython():  # a cell cannot do anything else meanwhile, and need not
        return
    warnings.warn(
        "a blocking fractal.sync call on a thread with a running event loop: nothing else on that loop runs until it"
        " returns; await the agent's own verbs instead",
        LoopBlockedWarning,
        stacklevel=level_of_caller(),
    )


def _in_ipython() -> bool:
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
