"""Requests of clients: their bodies, read within bounds, and what of their headers counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from random import getrandbits
from typing import Annotated, Any, Literal, TypeVar

import anyio
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.requests import ClientDisconnect, Request

from fractal.fastapi import CLIENT_HAS_GONE
from fractal.serving.problems import Problem

__all__ = [
    "Bounds",
    "Decision",
    "RunRequest",
    "header",
    "last_event_id",
    "read",
    "read_object",
    "request_id",
    "request_id_of",
    "shown_faults",
]

Body = TypeVar("Body", bound=BaseModel)

request_id: ContextVar[str | None] = ContextVar("fractal_request_id", default=None)
"""Id of the request that the current task serves; None outside of one."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_MOST_ERRORS = 10


class Bounds(BaseModel):
    """The bounds within which a body is read.

    Attributes:
        max_body: Bytes.
        seconds: How long it may take to come.
    """

    model_config = ConfigDict(frozen=True)

    max_body: int = Field(default=2**20, ge=1)
    seconds: float = Field(default=30.0, gt=0, allow_inf_nan=False)


class RunRequest(BaseModel):
    """A question for an agent."""

    model_config = ConfigDict(extra="forbid")

    input: str | dict[str, Any] | list[Any] = Field(description="Text, an object, or a list of chat content parts.")
    messages: list[dict[str, Any]] = Field(
        default=[], description="The conversation to go on with: `messages` of an earlier result."
    )
    timeout: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Seconds it may take; no more than the server allows."
    )
    agent: str | None = Field(default=None, max_length=200, description="Name of the agent; null for the first.")


class Decision(BaseModel):
    """An answer about a tool call that waits for approval."""

    model_config = ConfigDict(extra="forbid")

    decision: Literal["allow", "deny"]
    reason: Annotated[str, StringConstraints(max_length=4000)] | None = Field(
        default=None, description="Why not, as the model is told."
    )
    arguments: dict[str, Any] | None = Field(
        default=None, description="All arguments to call it with, in place of those that the model sent."
    )


def header(request: Request, name: bytes) -> str | None:
    """The first header of a name in small letters; Starlette's own mapping takes a microsecond for each look."""
    for each, value in request.scope["headers"]:
        if each == name:
            text: str = value.decode("latin-1")
            return text
    return None


def request_id_of(request: Request) -> str:
    """The id of a request: the client's, if it is harmless, or a new one."""
    given = header(request, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else f"req_{getrandbits(96):024x}"


async def read_bytes(request: Request, bounds: Bounds) -> bytes:
    """The body of a request.

    Raises:
        Problem: It is too long, 413; does not come in time, 408; is no JSON by its own word, 415; or has no end, 499.
    """
    if (header(request, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "not_json", "send a body with the content type application/json")
    length = header(request, b"content-length") or ""
    if length.isdecimal() and len(length) < 20 and int(length) > bounds.max_body:
        raise _too_long(bounds)
    pieces, size = list[bytes](), 0
    with anyio.move_on_after(bounds.seconds) as scope:
        try:
            async with aclosing(request.stream()) as stream:
                async for piece in stream:
                    size += len(piece)
                    if size > bounds.max_body:
                        raise _too_long(bounds)
                    pieces.append(piece)
        except ClientDisconnect:
            raise Problem(CLIENT_HAS_GONE, "client_gone", "the client has gone") from None
    if scope.cancelled_caught:
        raise Problem(408, "too_slow", f"the body has not come within {bounds.seconds:g} s")
    return b"".join(pieces)


def _too_long(bounds: Bounds) -> Problem:
    return Problem(413, "too_long", f"the body is longer than {bounds.max_body} bytes")


async def read(kind: type[Body], request: Request, bounds: Bounds) -> Body:
    """The body of a request, validated.

    Raises:
        Problem: As `read` of a model: 413, 408, 415, 499, or 422.
    """
    body = await read_bytes(request, bounds)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


async def read_object(request: Request, bounds: Bounds) -> dict[str, Any]:
    """The body of a request, an object of any shape.

    Raises:
        Problem: As `read`.
    """
    return (await read(_AnyObject, request, bounds)).model_extra or {}


class _AnyObject(BaseModel):
    model_config = ConfigDict(extra="allow")


def _invalid(error: ValidationError) -> Problem:
    """The problem of a request that does not fit, without what was in it."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return Problem(422, "invalid_request", "the request does not fit: see errors", errors=shown_faults(faults))


def shown_faults(faults: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first faults that a validation has found: where each is and what it is, without what was sent."""
    return [
        {"loc": [str(each)[:100] for each in fault["loc"][:10]], "msg": fault["msg"][:500]}
        for fault in faults[:_MOST_ERRORS]
    ]


def last_event_id(request: Request, run_id: str | None = None) -> tuple[str, int] | None:
    """The run and the number of the event that a reader who comes back names as its last; None if it names none.

    Args:
        request: The request.
        run_id: The run that it has to be of; None for any.

    Raises:
        Problem: It is none of our ids, or of another run.
    """
    given = header(request, b"last-event-id")
    if not given:
        return None
    matched = re.fullmatch(r"(run_[0-9a-f]{32})\.([0-9]{1,15})", given, re.ASCII)
    if matched is None or run_id not in (None, matched[1]):
        raise Problem(400, "last_event_id", "Last-Event-ID is no id of an event of this run")
    return matched[1], int(matched[2])
