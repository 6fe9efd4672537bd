"""Conversations that last: what is said goes to a store whenever it is whole.

All that touches a store blocks, and is done in worker threads that are waited for: a cancelled caller waits for the
transaction that has begun, which is made whole or not at all. Nothing here belongs to an event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio

from fractal._checks import is_count
from fractal._concurrency.workers import run_in_thread
from fractal._copies import copied_messages
from fractal._json import decode, encode
from fractal._texts import clean_text, repr_of
from fractal.durable.conversations_access import Access
from fractal.durable.conversations_sql import ConversationInfo, Head, Row, Rows
from fractal.errors import InvalidArguments, InvalidMessages, StoreUnreadable
from fractal.messages import Message, Transcript

if TYPE_CHECKING:
    from types import TracebackType

    from fractal._engine.keeper import Keeper

__all__ = ["Conversation", "ConversationInfo", "Conversations"]

T = TypeVar("T")

LONGEST_ID = 200
LONGEST_PAGE = 10_000


class Conversations:
    """A store of conversations, each with an id: `SQLiteConversations` or `PostgresConversations`.

    Ids are texts of up to 200 characters, without control characters, and mean nothing to the store. Every method
    opens what it needs and closes it again, so a store belongs to no event loop, thread or process.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    def open(self, conversation_id: str) -> Conversation:
        """Open a conversation for a block; one that is not there yet is made when something is said.

        Args:
            conversation_id: Its id.

        Returns:
            The conversation, to be entered.

        Raises:
            InvalidArguments: That cannot be an id.

        Example:
            ```python
            async with SQLiteConversations("talks.db").open("trip") as conversation:
                await agent.run("What should I see?", conversation=conversation)
            ```
        """
        return Conversation(self._access, checked_id(conversation_id))

    async def list(self, *, prefix: str = "", after: str = "", limit: int = 1000) -> list[ConversationInfo]:
        """List conversations, by id.

        Args:
            prefix: How their ids begin.
            after: An id; only those that follow it.
            limit: The most to list.

        Returns:
            What is known of each. For the next page, give the id of the last one as `after`.

        Raises:
            StoreError: The store cannot be read.
        """
        if not is_count(limit, 1) or limit > LONGEST_PAGE:
            raise InvalidArguments(f"limit={limit!r}: give a number from 1 to {LONGEST_PAGE}")
        for name, text in (("prefix", prefix), ("after", after)):
            if text != "":
                checked_id(text, name)
        return await self._access.once(lambda rows: rows.listed(prefix, after, limit))

    async def fork(self, conversation_id: str, new_id: str, *, length: int | None = None) -> ConversationInfo:
        """Make another conversation that begins like one that is there.

        Args:
            conversation_id: The one that is there.
            new_id: Id of the other one.
            length: Number of messages that both have in common; None for all.

        Raises:
            ConversationNotFound: There is no such conversation.
            ConversationExists: The other one is there already.
            InvalidArguments: It has fewer messages, or the last of them would be calls without results.
            StoreError: The store cannot be read or written.
        """
        source, target = checked_id(conversation_id), checked_id(new_id, "new_id")
        if length is not None and not is_count(length, 1):
            raise InvalidArguments(f"length={length!r}: give a number of messages, or None for all")
        return await self._access.once(lambda rows: rows.fork(source, target, length, partial(_check_cut, length)))

    async def delete(self, conversation_id: str) -> bool:
        """Delete a conversation; whoever has it open gets a `ConversationConflict` at the next word.

        Returns:
            Whether there was one.

        Raises:
            StoreError: The store cannot be written.
        """
        one = checked_id(conversation_id)
        return await self._access.once(lambda rows: rows.delete(one))

    async def export(self, conversation_id: str) -> dict[str, Any]:
        """Read a whole conversation as one JSON object, which `fractal chat --continue` takes, too.

        Returns:
            `format`, `version`, `id`, `revision`, `created` and `changed` in ISO 8601, and `messages`.

        Raises:
            ConversationNotFound: There is none with that id.
            StoreError: The store cannot be read.
        """
        one = checked_id(conversation_id)
        info, found = await self._access.once(lambda rows: rows.export(one))
        messages = _messages_of(found, self._access.name, one)
        return {
            "format": "fractal-conversation",
            "version": 1,
            "id": info.id,
            "revision": info.revision,
            "created": info.created.isoformat(),
            "changed": info.changed.isoformat(),
            "messages": messages,
        }


class Conversation:
    """A conversation in a store, open for a block; made by `Conversations.open`.

    Give it to runs, one after the other: `agent.run("…", conversation=conversation)`. Each goes on with what was said,
    and keeps what is said: its question with what that has led to, whenever all tool calls are answered. Of two that
    go on at the same place, the second one gets a `ConversationConflict`.

    Attributes:
        id: Its id.
    """

    def __init__(self, access: Access, conversation_id: str) -> None:
        self.id = conversation_id
        self._access = access
        self._rows: Rows | None = None
        self._lock = threading.Lock()  # around `_rows`: a connection serves one thread at a time
        self._head: Head | None = None
        self._messages: list[Message] = []
        self._runs: list[str | None] = []  # who has said each of them
        self._is_open = False

    @property
    def messages(self) -> list[Message]:
        """A new list of the messages, as they were read or kept here last."""
        return copied_messages(self._messages)

    @property
    def revision(self) -> int:
        """The number of times that something was kept; 0 while there is nothing."""
        return self._head.revision if self._head is not None else 0

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise InvalidArguments("this conversation is open already: open() it again for another block")
        self._is_open = True
        try:
            await self.reload()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def reload(self) -> None:
        """Read the conversation anew: after a `ConversationConflict`, say.

        Raises:
            StoreError: It cannot be read.
        """

        def read(rows: Rows) -> None:
            head, found = rows.load(self.id)
            messages = _messages_of(found, self._access.name, self.id)
            self._head, self._messages, self._runs = head, messages, [each.run for each in found]

        await self._do(read)

    async def append(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Keep messages that follow those that are there, all or none.

        Args:
            messages: Messages that an endpoint accepts, with each tool call answered.

        Raises:
            InvalidMessages: They are no such history.
            ConversationConflict: Somebody else has gone on with the conversation.
            StoreError: They cannot be written.
        """
        await self._append(self._head, Transcript(messages).messages, None)

    async def fork(self, new_id: str, *, length: int | None = None) -> ConversationInfo:
        """Make another conversation that begins like this one; see `Conversations.fork`."""
        return await Conversations(self._access).fork(self.id, new_id, length=length)

    def begin_turn(self, run_id: str | None) -> Keeper:
        """Make the hold of one run on the conversation; the engine calls it.

        Args:
            run_id: Id of a durable run, which may have said something here before its process ended; else None.

        Raises:
            InvalidArguments: The conversation is not open.
        """
        self._require_open()
        append, history, position = partial(self._append, run_id=run_id), self._messages, len(self._messages)
        if run_id is not None and run_id in self._runs:
            first = self._runs.index(run_id)
            history, position = history[:first], first + self._runs.count(run_id)
        return _Turn(self._check, append, self._head, history, position, is_last=position == len(self._messages))

    async def _append(self, head: Head | None, messages: Sequence[Message], run_id: str | None) -> Head | None:
        if not messages:
            return head
        new_rows = [Row(encode(message).decode(), run_id) for message in messages]

        def write(rows: Rows) -> Head:
            new = rows.append(self.id, head, new_rows)
            if self._head == head:  # here, in the thread: however the waiting ends, this is what there is now
                self._messages = [*self._messages, *(decode(each.text) for each in new_rows)]
                self._runs = [*self._runs, *(each.run for each in new_rows)]
                self._head = new
            return new

        return await self._do(write)

    async def _check(self, head: Head | None) -> None:
        await self._do(lambda rows: rows.require(self.id, head))

    async def _do(self, operation: Callable[[Rows], T]) -> T:
        self._require_open()

        def locked() -> T:
            with self._lock:
                self._require_open()  # it may have been closed since
                if self._rows is None or self._rows.is_lost:
                    self._rows = self._access.connect()
                return operation(self._rows)

        return await self._access.patiently(locked)

    def _require_open(self) -> None:
        if not self._is_open:
            raise InvalidArguments(
                f"conversation {self.id!r} is not open: use it inside of `async with store.open({self.id!r})`"
            )

    async def _close(self) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await run_in_thread(self._close_rows, abandon=False)
        finally:
            self._close_rows()  # asyncio's own cancellation may have come before the thread

    def _close_rows(self) -> None:
        with self._lock:
            self._is_open = False
            rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()


class _Turn:
    """The hold of one run on a conversation.

    Attributes:
        history: What had been said before the run.
        position: Number of messages that are kept.
    """

    def __init__(
        self,
        check: Callable[[Head | None], Awaitable[None]],
        append: Callable[[Head | None, Sequence[Message]], Awaitable[Head | None]],
        head: Head | None,
        history: Sequence[Message],
        position: int,
        *,
        is_last: bool,
    ) -> None:
        self._check, self._append, self._head, self._is_last = check, append, head, is_last
        self.history, self.position = history, position

    async def begin(self) -> None:
        """Look whether somebody else has gone on with the conversation, before anything is paid for.

        Raises:
            ConversationConflict: Somebody has.
            StoreError: The store cannot be read.
        """
        # Where others have gone on after what this run had said, no state of the conversation is the right one.
        await self._check(self._head if self._is_last else None)

    async def keep(self, messages: Sequence[Message]) -> None:
        """Keep the messages that follow the position, all or none.

        Raises:
            ConversationConflict: Somebody else has gone on with the conversation.
            StoreError: They cannot be written.
        """
        self._head = await self._append(self._head, messages)
        self.position += len(messages)


def checked_id(value: object, name: str = "conversation_id") -> str:
    """Return the id of a conversation.

    Raises:
        InvalidArguments: It cannot be one.
    """
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_ID:
        raise InvalidArguments(f"{name}={repr_of(value)[:100]}: give a text of 1 to {LONGEST_ID} characters")
    if clean_text(value) != value or any(ord(each) < 32 or 127 <= ord(each) < 160 for each in value):
        raise InvalidArguments(f"{name}={repr_of(value)[:100]}: give a text without control characters")
    return str(value)


def _check_cut(length: int | None, rows: Sequence[Row]) -> None:
    """Raise if the first so many messages of a conversation are no conversation."""
    if length is not None and length > len(rows):
        raise InvalidArguments(f"length={length}: there are {len(rows)} messages")
    try:
        Transcript(decode(each.text) for each in rows[:length])
    except InvalidMessages as error:
        raise InvalidArguments(f"length={length}: cut there, {error}") from None


def _messages_of(rows: Sequence[Row], store: str, conversation_id: str) -> list[Message]:
    try:
        return Transcript(decode(each.text) for each in rows).messages
    except (ValueError, InvalidMessages) as error:
        raise StoreUnreadable(store, f"conversation {conversation_id!r} is damaged: {error}") from None
