"""The store of conversations that the command line uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fractal.cli.which_agent import WrongUse
from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from fractal.durable import Conversation, Conversations

__all__ = ["conversation_of"]

VARIABLE = "FRACTAL_CONVERSATIONS"


def conversation_of(conversation_id: str, where: str | None) -> Conversation:
    """A conversation by its id, not open yet.

    Args:
        conversation_id: The id.
        where: A file, or what to connect to. None: what the environment says, or a file of the user's own.

    Raises:
        WrongUse: That cannot be.
    """
    try:
        return _store_at(where or os.environ.get(VARIABLE) or None).open(conversation_id)
    except InvalidArguments as error:
        raise WrongUse(f"--conversation: {error}") from None


def _store_at(where: str | None) -> Conversations:
    from fractal.durable import PostgresConversations, SQLiteConversations

    if where is None:
        return SQLiteConversations(_own_file())
    if where.startswith(("postgresql://", "postgres://")):
        return PostgresConversations(where)
    return SQLiteConversations(where)


def _own_file() -> Path:
    """The file of whoever calls, whose directory is made for its owner alone."""
    try:
        folder = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fractal"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter: a home that nobody knows
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise WrongUse(f"there is no directory for conversations ({reason}): name a file with --store") from None
    return folder / "conversations.db"
