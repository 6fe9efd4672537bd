"""Observers: functions that are told what happens in a run, and may take part in it.

Nothing that they do or raise disturbs it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinMethodType, MethodType
from typing import Any, TypeVar

import anyio

from fractal._concurrency.stall import is_guarded, watched
from fractal._forms import shown
from fractal._functions.callables import is_async, is_plain
from fractal._json import decode
from fractal._log import log
from fractal._texts import is_a, log_line, name_of, repr_of, str_of, type_name
from fractal.errors import InvalidArguments
from fractal.events import Event, Observer, RunEvent, RunObserver

__all__ = [
    "Brief",
    "checked_observers",
    "companions_of",
    "enter_call",
    "helpers_among",
    "interested",
    "is_same",
    "note_unused",
    "request_headers",
    "settle_all",
    "tell_all",
]

T = TypeVar("T")

LONGEST_SETTLING = 1.0
"""Seconds that an observer has when a run has ended."""


def checked_observers(observers: object) -> tuple[Observer, ...]:
    """The observers that an agent is given.

    Raises:
        InvalidArguments: One cannot be called, or would have to be awaited; or they are no list.
    """
    if not isinstance(observers, Iterable) or isinstance(observers, (str, bytes)):
        raise InvalidArguments(f"observers={repr_of(observers)}: give a list of functions, one alone too")
    given: tuple[Any, ...] = tuple(observers)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    for observer in given:
        if not callable(observer):
            raise InvalidArguments(f"observers: {repr_of(observer)} cannot be called with an event")
        if not is_plain(observer):
            raise InvalidArguments(
                f"observers: {repr_of(observer)} is async or a generator, and nobody awaits it: give a plain function;"
                " one that has to wait puts the event into a queue"
            )
        if is_a(observer, RunObserver):
            _check_companion(observer)
    return given


def _check_companion(observer: RunObserver) -> None:
    for name in ("wants_run", "enter_call", "request_headers", "is_settled"):
        if not is_plain(getattr(observer, name)):
            raise InvalidArguments(f"observers: {name} of {repr_of(observer)} has to be a plain function")
    if not is_async(observer.settle):
        raise InvalidArguments(f"observers: settle of {repr_of(observer)} has to be an async function")


def interested(observers: Iterable[Observer], others: Sequence[Observer]) -> tuple[Observer, ...]:
    """The observers that want a run's events, each once, without those of another list."""
    found: list[Observer] = []
    for observer in observers:
        # Most often there is nobody else.
        is_listed = (found or others) and any(is_same(observer, other) for other in (*found, *others))
        if not is_listed and (not is_a(observer, RunObserver) or _asked(observer.wants_run)):
            found.append(observer)
    return tuple(found)


def companions_of(observers: Iterable[Observer]) -> tuple[RunObserver, ...]:
    """The observers that take part in the work of a run."""
    return tuple(each for each in observers if is_a(each, RunObserver))


def helpers_among(companions: Iterable[RunObserver]) -> tuple[RunObserver, ...]:
    """The observers that prepare calls or give requests headers; to ask the others would be in vain."""
    return tuple(each for each in companions if _is_own(each.enter_call) or _is_own(each.request_headers))


def _is_own(method: Callable[..., Any]) -> bool:
    """Whether an observer overrides a method of its base class."""
    return getattr(method, "__func__", None) not in (RunObserver.enter_call, RunObserver.request_headers)


def enter_call(companions: Iterable[RunObserver], run_id: str, call_id: str) -> None:
    """Let observers prepare the context of a tool call, in its task."""
    for observer in companions:
        _asked(observer.enter_call, run_id, call_id)


def request_headers(companions: Iterable[RunObserver], run_id: str) -> dict[str, str]:
    """The headers that observers add to a request."""
    headers: dict[str, str] = {}
    for observer in companions:
        wanted: dict[Any, Any] | None = _asked(_headers_of, observer, run_id)
        for name, value in wanted.items() if wanted else ():
            if _may_be_sent(name, value):
                headers[name] = value
            else:
                log.warning(f"observer {repr_of(observer)} may not give a request the header {repr_of(name)}")
    return headers


def _headers_of(observer: RunObserver, run_id: str) -> dict[Any, Any]:
    return dict(observer.request_headers(run_id))


def _may_be_sent(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, str)
        and _HEADER.fullmatch(name) is not None
        and _NOT_THEIRS.search(name) is None
        and value.isascii()
        and value.isprintable()
        and value == value.strip()
    )


_HEADER = re.compile("[a-zA-Z0-9_-]+")
_NOT_THEIRS = re.compile(  # what frames a request, or says who asks: connections are shared by those who sign alike
    "^(host|connection|keep-alive|te|trailer|upgrade|expect|user-agent|(accept|content|transfer|proxy|openai)(-.*)?)$"
    "|auth|key|token|secret|passw|cookie|cred|^x-stainless-",
    re.IGNORECASE,
)


async def settle_all(companions: Iterable[RunObserver], run_id: str) -> None:
    """Let observers finish, for a bounded time."""
    for observer in companions:
        if _asked(observer.is_settled, run_id):
            continue
        with anyio.move_on_after(LONGEST_SETTLING, shield=True) as scope:
            try:
                await observer.settle(run_id)
            except Exception as error:
                log.failure(f"observer {repr_of(observer)} could not finish after a run", error)
        if scope.cancelled_caught:
            log.warning(f"observer {repr_of(observer)} has not finished {LONGEST_SETTLING:g} s after the run")


def _asked(ask: Callable[..., Any], *about: object) -> Any:
    """The value that an observer returns; None if it fails."""
    try:
        return ask(*about)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # no cancellation arrives here, where nothing is awaited
        log.failure(f"{name_of(ask)} of an observer failed", error)
        return None


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are the same."""
    # A bound method is made anew each time it is looked up. What the `==` of a user's class says does not count.
    return one is other or (type(one) is type(other) and type(one) in _METHODS and one == other)


_METHODS = (MethodType, BuiltinMethodType)


def tell_all(observers: Iterable[Observer], event: Event, warn: Callable[[str], object]) -> None:
    """Hand an event to each observer; an exception of one is logged.

    Args:
        observers: Who is told.
        event: What happened.
        warn: Told of an observer that blocks the event loop, or that has to be awaited.
    """
    for observe in observers:
        try:
            answer = _call_watched(observe, event, warn) if is_guarded() else observe(event)
            if answer is not None:
                note_unused(f"observer {name_of(observe)!r}", answer, warn)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # no cancellation arrives here, where nothing is awaited
            log.failure(f"observer {repr_of(observe)} failed on {event.kind}", error)


def _call_watched(observe: Observer, event: Event, warn: Callable[[str], object]) -> object:
    with watched(f"observer {name_of(observe)!r}", warn):
        return observe(event)


def note_unused(name: str, answer: object, warn: Callable[[str], object]) -> None:
    """Warn of a function that returned an awaitable nobody awaits."""
    if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
        answer.close()
    elif not inspect.isasyncgen(answer):
        return  # a task goes on by itself, and of everything else nobody has said what it is for
    # Without its address, so that what is found at each event is told of once.
    warn(f"{name} gave a value of the type {type_name(answer)}, which nobody awaits: it has to be a plain function")


class Brief:
    """An event as one line of a log, made only if the line is written."""

    __slots__ = ("event",)

    def __init__(self, event: RunEvent) -> None:
        self.event = event

    def __str__(self) -> str:
        event: Any = self.event
        facts = " ".join(f"{name}={_in_brief(getattr(event, name))}" for name in event.__slots__ if name not in _UNSAID)
        about = f"agent={_in_brief(event.agent_name)} run={event.run_id[:8]} depth={event.depth}"
        return log_line(f"{event.kind} {about} {facts}")


_UNSAID = frozenset({"kind", "history", "limits", "timeout", "opening", "added", "kept", "tools"})
"""What a line of a log leaves out: it is there already, or too long."""


_LONGEST_IN_LOG = 200
"""Characters of a value."""


def _in_brief(value: object) -> str:
    if is_a(value, float):
        return f"{value:.3g}"
    text = shown(value) if value is None or type(value) in (str, int, dict) else repr(str_of(value))
    text = str(decode(_without_secrets()(text)))
    return text if len(text) <= _LONGEST_IN_LOG else text[:_LONGEST_IN_LOG] + "…"


@functools.cache
def _without_secrets() -> Callable[[str], bytes]:
    from fractal._redact import PayloadWriter  # what nobody loads who has no log

    # Cut only then, so that no half of a secret stays.
    return PayloadWriter(max_text=10 * _LONGEST_IN_LOG)
