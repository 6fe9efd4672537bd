"""What goes along with a request on its way, and is no part of it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from fractal.models._secrets import Secrets
from fractal.models.bounds import DEFAULT_BOUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fractal.models.bounds import ReplyBounds

__all__ = ["Sending", "current_sending"]


class Sending:
    """The bounds, counters and secrets of a request under way.

    Args:
        bounds: The most that is read of the answer.
        charge: Called before the request is sent once more, to another address.
        secrets: What is known to be secret; what the request turns out to be signed with is added.
        headers: Further headers, which sign nothing: connections are shared by requests with other ones.
    """

    __slots__ = ("bounds", "charge", "headers", "secrets")

    def __init__(
        self,
        bounds: ReplyBounds,
        charge: Callable[[], None],
        secrets: Secrets,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.bounds, self.charge, self.secrets = bounds, charge, secrets
        self.headers = headers or {}


def _charge_nobody() -> None:
    pass


_current: ContextVar[Sending | None] = ContextVar("fractal_sending", default=None)


class current_sending:
    """A block in which the HTTP clients of an SDK send with this `Sending`.

    Args:
        sending: What goes along.
    """

    __slots__ = ("_sending", "_token")

    def __init__(self, sending: Sending) -> None:
        self._sending = sending

    def __enter__(self) -> None:
        self._token = _current.set(self._sending)

    def __exit__(self, *exc: object) -> None:
        _current.reset(self._token)

    @staticmethod
    def get() -> Sending:
        """The `Sending` of a request that an HTTP client sends now."""
        return _current.get() or Sending(DEFAULT_BOUNDS, _charge_nobody, Secrets())
