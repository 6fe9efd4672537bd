"""What a run needs of a conversation that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fractal.messages import Message

__all__ = ["Keeper", "Kept"]


class Keeper(Protocol):
    """The hold of one run on a conversation that is kept.

    Attributes:
        history: What had been said before the run.
        position: Number of messages that are kept.
    """

    history: Sequence[Message]
    position: int

    async def begin(self) -> None:
        """Look whether somebody else has gone on with the conversation.

        Raises:
            StoreError: Somebody has, or the store does not work.
        """
        ...

    async def keep(self, messages: Sequence[Message]) -> None:
        """Keep the messages that follow the position, all or none.

        Raises:
            StoreError: None is kept.
        """
        ...


class Kept(Protocol):
    """A conversation that is kept, as far as runs need it."""

    def begin_turn(self, run_id: str | None) -> Keeper:
        """Make the hold of a run on the conversation; nothing is read or written yet.

        Args:
            run_id: Id of a durable run, which may have said something there before its process ended; else None.
        """
        ...
