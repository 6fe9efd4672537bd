"""Errors without the secrets of the request that they are about, in all that is kept of them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, cast

from fractal._texts import message_of, repr_of, str_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fractal.models._secrets import Secrets

__all__ = ["http_libraries", "is_clean", "mask", "secrets_with"]

_LONGEST_DOCUMENT = 1000  # characters that an error of JSON keeps of what was read


def mask(error: BaseException, secrets: Secrets, cause: BaseException | None) -> None:
    """Remove secrets from an error of ours, its attributes and notes, and give it a cause without secrets."""
    error.args = tuple(secrets.quoted(each) for each in error.args)
    for name, value in list(vars(error).items()):
        if isinstance(value, str):
            setattr(error, name, secrets.quoted(value))
    if getattr(error, "__notes__", None):
        error.__notes__ = [secrets.quoted(note) for note in error.__notes__]
    error.__cause__, error.__context__ = _clean_copy(cause, secrets), None


def _clean_copy(error: BaseException | None, secrets: Secrets) -> BaseException | None:
    """A copy of an error, of the same type and text, without secrets; None if none can be made.

    An error of an HTTP library has the request, and with it the key; so a copy is made without it.
    """
    if error is None:
        return None
    if isinstance(error, json.JSONDecodeError):
        return json.JSONDecodeError(secrets.quoted(error.msg), secrets.quoted(error.doc, _LONGEST_DOCUMENT), error.pos)
    if _is_of_http(error):
        return _made_anew(error, secrets.quoted(message_of(error)))
    if isinstance(error, OSError):
        return _made_anew(error, *(each if isinstance(each, int) else secrets.quoted(each) for each in error.args))
    return error if is_clean(error, secrets) else None


def _made_anew(error: BaseException, *arguments: object) -> BaseException | None:
    try:
        made = type(error)(*arguments)
    except Exception:  # a class of a user's is made of something else
        return None
    return made if made.args == arguments else None


def is_clean(error: BaseException, secrets: Secrets) -> bool:
    """Whether an error, with its causes, is free of secrets."""
    return not any(secrets.are_in(text) for each in _family(error, set()) for text in _texts_of(each))


def secrets_with(error: BaseException, secrets: Secrets) -> Secrets:
    """The secrets, with those that an error's request was signed with."""
    try:
        request = cast("Any", error).request
    except Exception:  # there is none, or a class of a user's has a property of that name
        return secrets
    return secrets.plus(request) if any(isinstance(request, http.Request) for http in http_libraries()) else secrets


def http_libraries() -> Iterator[Any]:
    """The HTTP libraries of the SDK's kind that somebody has loaded."""
    return (sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules)


def _is_of_http(error: BaseException) -> bool:
    kinds = ((http.TransportError, http.DecodingError, http.InvalidURL) for http in http_libraries())
    return any(isinstance(error, each) for each in kinds)


def _family(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    yield from _family(error.__cause__, seen)
    yield from _family(error.__context__, seen)
    if isinstance(error, BaseExceptionGroup):
        for member in cast("tuple[BaseException, ...]", error.exceptions):  # pyright: ignore[reportUnknownMemberType]
            yield from _family(member, seen)


def _texts_of(error: BaseException) -> Iterator[str]:
    yield message_of(error)
    yield repr_of(error)
    yield from map(str_of, getattr(error, "__notes__", ()))
