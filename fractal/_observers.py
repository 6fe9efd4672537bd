"""Observers: functions that are told what happens in a run. Nothing that they do or raise disturbs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, MethodType
from typing import Any

from fractal._hooks import is_plain
from fractal._log import log
from fractal._stall import is_guarded, watched
from fractal._texts import is_a, log_line, name_of, repr_of, str_of, type_name
from fractal._told import shown
from fractal.errors import InvalidArguments
from fractal.events import Event, Observer, RunEvent

__all__ = ["Brief", "checked_observers", "note_unused", "tell_all", "without_repeats"]


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
    return given


def without_repeats(observers: Iterable[Observer]) -> tuple[Observer, ...]:
    """Each observer once, the first time it comes."""
    unique: list[Observer] = []
    for observer in observers:
        if not any(_is_same(observer, other) for other in unique):
            unique.append(observer)
    return tuple(unique)


def _is_same(one: Observer, other: Observer) -> bool:
    # A bound method is made anew each time it is looked up. What the `==` of a user's class says does not count.
    return one is other or (type(one) is type(other) and type(one) in _METHODS and one == other)


_METHODS = (MethodType, BuiltinMethodType)


def tell_all(observers: Iterable[Observer], event: Event, warn: Callable[[str], object]) -> None:
    """Tell each observer of an event; what one raises is logged.

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
    """Warn of a function that nobody awaits, and that gave something to await."""
    if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
        answer.close()
    elif not inspect.isasyncgen(answer):
        return  # a task goes on by itself, and of everything else nobody has said what it is for
    warn(f"{name} gave a {type_name(answer)}, which nobody awaits: it has to be a plain function")


class Brief:
    """An event as one line of a log, made only if the line is written."""

    __slots__ = ("event",)

    def __init__(self, event: RunEvent) -> None:
        self.event = event

    def __str__(self) -> str:
        event: Any = self.event
        facts = " ".join(f"{name}={_in_brief(getattr(event, name))}" for name in event.__slots__ if name != "kind")
        about = f"agent={_in_brief(event.agent_name)} run={event.run_id[:8]} depth={event.depth}"
        return log_line(f"{event.kind} {about} {facts}")


def _in_brief(value: object) -> str:
    if is_a(value, float):
        return f"{value:.3g}"
    text = shown(value) if value is None or type(value) in (str, int, dict) else repr(str_of(value))
    return text if len(text) <= 200 else text[:200] + "…"
