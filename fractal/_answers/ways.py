"""The ways in which a model is asked for an answer of a type, and which of them an endpoint takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from fractal._concurrency.forks import lock
from fractal.errors import InvalidArguments, StatusError
from fractal.models._dialect import believed_until

__all__ = ["OutputMemory", "OutputMode", "OutputPlan", "Way"]

OutputMode = Literal["auto", "native", "tool", "prompt"]
"""How a model is made to answer with an object: `"native"` sends its JSON Schema as the request's `response_format`,
`"tool"` offers a tool that takes the answer, `"prompt"` describes it in words. `"auto"` tries them in this order, goes
on when the endpoint refuses one, and remembers that."""

Way = Literal["native", "tool", "prompt"]

_WAYS: tuple[Way, ...] = ("native", "tool", "prompt")
_MODES = ("auto", *_WAYS)


class OutputMemory:
    """The ways an endpoint has taken and refused, for each model; shared by the runs of an agent."""

    __slots__ = ("_lock", "_refused", "_taken")

    def __init__(self) -> None:
        self._lock = lock()
        self._refused: dict[tuple[str, Way], float] = {}  # until when that is believed
        self._taken: set[tuple[str, Way]] = set()

    def refused(self, model: str) -> frozenset[Way]:
        """The ways that the endpoint refuses for a model."""
        with self._lock:
            now = time.monotonic()
            return frozenset(way for (name, way), end in self._refused.items() if name == model and now < end)

    def takes(self, model: str, way: Way) -> bool:
        """Whether the endpoint has taken a way for a model before."""
        with self._lock:
            return (model, way) in self._taken

    def note(self, model: str, taken: Way, refused: Mapping[Way, StatusError]) -> None:
        """Remember that a way was taken after others were refused.

        A way that was ever taken is none that is refused: then it was one schema that the endpoint did not like.
        """
        with self._lock:
            self._taken.add((model, taken))
            self._refused |= {(model, way): believed_until(error) for way, error in refused.items()}
            for known in self._taken & self._refused.keys():
                del self._refused[known]


class OutputPlan:
    """The way in which a run asks for its answer, and the ways to try when the endpoint refuses that.

    The loop sends a request in the way of `way`. If it succeeds, `accepted()` is called; if it fails with a status,
    `refused(error)` says whether to send it again in the way that `way` then names. If not, `failure` is the error to
    raise.

    Args:
        mode: A way, or `"auto"` for the first that the endpoint takes.
        model: Name of the model at the endpoint.
        memory: What is known of the endpoint already.

    Attributes:
        way: The way to ask in now.

    Raises:
        InvalidArguments: There is no such mode.
    """

    __slots__ = ("_accepted", "_errors", "_left", "_memory", "_model", "way")

    def __init__(self, mode: OutputMode, model: str, memory: OutputMemory) -> None:
        if mode not in _MODES:
            raise InvalidArguments(f"output_mode={mode!r}: it is {', '.join(map(repr, _MODES[:-1]))} or {_MODES[-1]!r}")
        self._model, self._memory = model, memory
        self._errors: dict[Way, StatusError] = {}  # by the way that was refused
        self._accepted = False
        known = memory.refused(model)
        self._left: list[Way] = [way for way in _WAYS if way not in known] if mode == "auto" else [mode]
        self.way: Way = self._left.pop(0)

    def refused(self, error: StatusError) -> bool:
        """Whether the endpoint refuses the way, as far as the error tells, and another can be tried.

        Only what is in fields counts, never words: a status that says the request is not what the endpoint takes, and
        no field named as the culprit but one that the way has added.
        """
        if self._accepted or not self._may_refuse(error):
            return False
        self._errors[self.way] = error
        if not self._left:
            return False
        self.way = self._left.pop(0)
        return True

    def take(self, way: str | None) -> bool:
        """Choose a way that the endpoint is known to take; returns whether it is another one."""
        for position, other in enumerate(self._left):
            if other == way:
                self.way, self._left = other, self._left[position + 1 :]
                return True
        return False

    def accepted(self) -> None:
        """Note that the endpoint has taken the way, so that the earlier refusals were refusals of their ways."""
        if not self._accepted:
            self._accepted = True
            self._memory.note(self._model, self.way, self._errors)

    def failure(self, error: StatusError) -> StatusError:
        """The error to raise for one after which no other way was tried.

        If the endpoint refused every way, the fault is somewhere else, and its first answer is the one that was given
        to the request as it was meant.
        """
        if self._errors.get(self.way) is not error:
            return error
        first, *later = self._errors.items()
        for way, other in later:
            first[1].add_note(f"asked again with output_mode={way!r}: {other}")
        return first[1]

    def _may_refuse(self, error: StatusError) -> bool:
        if not error.is_refusal:
            return False
        if not error.names:
            return not self._memory.takes(self._model, self.way)
        return "messages" not in error.names and not error.names.isdisjoint(_ADDED[self.way])


_ADDED: dict[Way, set[str]] = {"native": {"response_format"}, "tool": {"tools", "tool_choice"}, "prompt": set()}
