"""What an endpoint refuses of what others take or want, learned from its refusals.

A refusal is told by its status and by the field it names, never by its words. Where it names none, everything that the
endpoint has not taken before is left out once, one thing after the other; what helped is remembered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from fractal.errors import BudgetExceeded, StatusError
from fractal.model import ModelRequest, Reply

__all__ = ["Dialect", "believed_until"]

Feature: TypeAlias = str
"""What a request may have that an endpoint may refuse.

`usage`: the usage at the end of a stream. `null_content`, `blank_content`: null or an empty text beside tool calls.
`user_after_tool`: a user's turn right after a tool's result. `extra`, `call_extra`: fields of its own messages that
nobody has standardized, in those without and with tool calls. `tool_choice`: `"none"` where only an answer is wanted.
`max_tokens`: the name of that field, which newer models want to be `max_completion_tokens`.
"""


_BELIEVED = 600.0
"""Seconds that a status 500 counts as a refusal of what was left out when it went away."""

_NONE: frozenset[Feature] = frozenset()


def believed_until(error: StatusError) -> float:
    """The time, on `time.monotonic()`'s clock, after which a refused feature is tried again.

    A server that fails (500) may have failed by chance, so that is not believed for good.
    """
    return time.monotonic() + _BELIEVED if error.status == 500 else math.inf


@dataclass(frozen=True, slots=True)
class _Concession:
    """A way to do without a feature that an endpoint refuses.

    Attributes:
        feature: The feature.
        names: Fields that a refusal may name.
        without: Makes the request without it.
    """

    feature: Feature
    names: frozenset[str]
    without: Callable[[ModelRequest], ModelRequest]


def _without_field(name: str) -> Callable[[ModelRequest], ModelRequest]:
    def without(request: ModelRequest) -> ModelRequest:
        return replace(request, fields={key: value for key, value in request.fields.items() if key != name})

    return without


def _in_form(**changes: str) -> Callable[[ModelRequest], ModelRequest]:
    def in_form(request: ModelRequest) -> ModelRequest:
        return replace(request, form=request.form._replace(**cast("Any", changes)))

    return in_form


def _with_newer_name(request: ModelRequest) -> ModelRequest:
    limit = {"max_completion_tokens": request.settings.max_tokens}
    return replace(request, settings=replace(request.settings, max_tokens=None), fields={**request.fields, **limit})


_MESSAGES = frozenset({"messages", "content"})
_CONCESSIONS = (
    _Concession("usage", frozenset({"stream_options", "include_usage"}), _without_field("stream_options")),
    _Concession("null_content", _MESSAGES, _in_form(content="blank")),
    _Concession("blank_content", _MESSAGES, _in_form(content="null")),
    _Concession("user_after_tool", _MESSAGES, _in_form(between="turn")),
    _Concession("extra", _MESSAGES, _in_form(extra="calls")),
    _Concession("call_extra", _MESSAGES, _in_form(extra="none")),
    _Concession("tool_choice", frozenset({"tool_choice"}), _without_field("tool_choice")),
    _Concession("max_tokens", frozenset({"max_tokens"}), _with_newer_name),
)


_ALWAYS_TAKEN = frozenset({"audio"})


def _features_of(request: ModelRequest) -> set[Feature]:
    """The features of a request that some endpoint may refuse."""
    features = request.transcript.traits - _ALWAYS_TAKEN
    if "stream_options" in request.fields:
        features.add("usage")
    if request.fields.get("tool_choice") == "none":
        features.add("tool_choice")
    if request.settings.max_tokens is not None:
        features.add("max_tokens")
    return features


class Dialect:
    """The features that an endpoint is known to take and to refuse, for each model; shared by all requests to it."""

    __slots__ = ("_in_vain", "_refused", "_taken")

    def __init__(self) -> None:
        self._refused: dict[str, dict[Feature, float]] = {}  # until when that is believed
        self._taken: dict[str, frozenset[Feature]] = {}
        self._in_vain: dict[str, frozenset[Feature]] = {}  # left out since the last answer, which did not help

    def is_known(self, request: ModelRequest) -> bool:
        """Whether the endpoint has taken, or has refused, everything that is in a request."""
        return _features_of(request) <= self._refused_by(request.model) | self._taken.get(request.model, _NONE)

    async def ask(
        self,
        request: ModelRequest,
        send: Callable[[ModelRequest], Awaitable[Reply]],
        is_final: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Send a request in a form that the endpoint takes, as far as that is known or can be found.

        Args:
            request: The request as others take it.
            send: Sends it.
            is_final: Whether a failure is final, since a piece of the reply has been shown.

        Raises:
            ModelError: There is no usable answer; the first one, if no other form helps.
        """
        features = _features_of(request)
        known = self._refused_by(request.model) if self._refused else _NONE
        try:
            reply = await send(_without(request, features & known) if known else request)
        except StatusError as error:
            if is_final() or not error.is_refusal:
                raise
            failure = error
        else:
            if self._in_vain or not features <= self._taken.get(request.model, _NONE):
                self._note(request.model, features, known)
            return reply
        return await self._ask_otherwise(request, send, is_final, known, failure)

    async def _ask_otherwise(
        self,
        request: ModelRequest,
        send: Callable[[ModelRequest], Awaitable[Reply]],
        is_final: Callable[[], bool],
        known: frozenset[Feature],
        failure: StatusError,
    ) -> Reply:
        features, first, tried = _features_of(request), failure, set[Feature]()
        while (feature := self._next(request, features - known - tried, failure)) is not None:
            tried.add(feature)
            trial = known | {feature}
            try:
                request.charge()
            except BudgetExceeded:
                break
            try:
                reply = await send(_without(request, features & trial))
            except StatusError as error:
                if is_final() or not error.is_refusal:
                    raise
                if not _is_same(error, failure):  # one refusal less: what is refused now is something else
                    known, failure = trial, error
                else:
                    self._in_vain[request.model] = self._in_vain.get(request.model, _NONE) | {feature}
            else:
                self._note(request.model, features, trial, failure)
                return reply
        raise first

    def _refused_by(self, model: str) -> frozenset[Feature]:
        refused = self._refused.get(model)
        if not refused:
            return _NONE
        now = time.monotonic()
        return frozenset(feature for feature, end in refused.items() if now < end)

    def _next(self, request: ModelRequest, features: set[Feature], error: StatusError) -> Feature | None:
        """The feature to leave out next: the one that the error names, or one that the endpoint has yet to take."""
        innocent = self._taken.get(request.model, _NONE) | self._in_vain.get(request.model, _NONE)
        if "response_format" in request.fields:  # is refused more often, and the run knows another way
            innocent |= {"usage"}
        for one in _CONCESSIONS:
            is_meant = not one.names.isdisjoint(error.names) if error.names else one.feature not in innocent
            if is_meant and one.feature in features:
                return one.feature
        return None

    def _note(
        self, model: str, features: set[Feature], refused: frozenset[Feature], error: StatusError | None = None
    ) -> None:
        """Remember the features left out of a request that the endpoint has taken, and those in it."""
        if error is not None:
            end = believed_until(error)
            known = self._refused.get(model, {})
            self._refused[model] = {**known, **{one: max(end, known.get(one, end)) for one in refused}}
        self._in_vain.pop(model, None)
        self._taken[model] = self._taken.get(model, _NONE) | (features - refused)


def _without(request: ModelRequest, features: set[Feature]) -> ModelRequest:
    for one in _CONCESSIONS if features else ():
        if one.feature in features:
            request = one.without(request)
    return request


def _is_same(error: StatusError, other: StatusError) -> bool:
    return (error.status, error.code, error.param, str(error)) == (other.status, other.code, other.param, str(other))
