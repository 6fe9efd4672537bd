"""Streams to endpoints: opened, directly or through a proxy, with TLS or without; and a look at what was read ahead.

This module loads httpx2, so nothing imports it before the first request.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute, TLSStream

from fractal.models._http.dialing import dial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


__all__ = ["LAST_PORT", "PORTS", "WRITTEN_AT_ONCE", "Link", "MakeTls", "Origin", "Wired", "connect", "secured"]

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""

LAST_PORT = 65_535
PORTS = {"http": 80, "https": 443}
"""Those of URLs that name none."""

MakeTls: TypeAlias = "Callable[[], Awaitable[ssl.SSLContext]]"
"""Makes what https needs, when it is needed first."""

WRITTEN_AT_ONCE = 16 * 1024
"""Bytes that the system takes without a wait, whatever the other side does."""

_WRITTEN_BETWEEN_LOOKS = 256 * 1024  # bytes; more of them would keep the event loop from reading
_RECORD_HEAD = 5  # bytes: what a record of TLS is, and how long


class Link(ByteStream):
    """A stream whose writing may be given up while its reading goes on.

    An endpoint that takes no more of a request has mostly said why. Where writing fails, asyncio closes the socket
    with what has come there, and where it fails or is cancelled, AnyIO's TLS does not read any more. So what is long
    is written past asyncio, and neither is to be seen from above.

    Args:
        stream: The stream.

    Attributes:
        is_cut: Whether some of what was to be written was not.
        is_full: Whether the system has no room for the rest of what is being written.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._socket: socket.socket | None = None
        if isinstance(stream, SocketStream):
            self._socket = stream.extra(SocketAttribute.raw_socket)
        self._writing: anyio.CancelScope | None = None
        self.is_cut = self.is_full = False

    async def send(self, item: bytes) -> None:
        """Write until all is written, or until writing is given up."""
        with anyio.CancelScope() as self._writing:
            try:
                if self._socket is None or (len(item) <= WRITTEN_AT_ONCE and not self.is_full):
                    await self._stream.send(item)
                else:
                    await _write(self._socket, item)
            except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.is_cut = True
        self.is_full = False
        self.is_cut |= self._writing.cancelled_caught

    def send_at_once(self, item: bytes) -> bytes:
        """Write as much as the system takes without a wait.

        Returns:
            What is left for `send`. Nothing, too, if the other side takes no more.
        """
        if self._socket is None or sys.platform == "win32":  # where a socket is no file
            return item
        try:
            # Neither by a duplicate of the socket nor by the stream: each costs as much as all that is written here.
            item = item[os.write(self._socket.fileno(), memoryview(item)[:_WRITTEN_BETWEEN_LOOKS]) :]
        except BlockingIOError:
            pass
        except OSError:
            self.is_cut, item = True, b""
        self.is_full = bool(item)
        return item

    def give_up(self) -> None:
        """Stop writing, as if all were written."""
        if self._writing is not None:
            self._writing.cancel()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Read the next bytes."""
        return await self._stream.receive(max_bytes)

    async def send_eof(self) -> None:
        """End the writing."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The attributes of the stream below."""
        stream: Any = self._stream
        attributes: Mapping[Any, Callable[[], Any]] = stream.extra_attributes
        return attributes


class _BelowTls(Link):
    """The link below TLS, which knows whether TLS has been given only a part of a record."""

    def __init__(self, stream: ByteStream) -> None:
        super().__init__(stream)
        self._missing = 0  # bytes of the record that is being read
        self._head = b""  # of a record whose length is not known yet

    @property
    def is_within_a_record(self) -> bool:
        """Whether the rest of a record has yet to come."""
        return self._missing > 0 or bool(self._head)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Read the next bytes, and note whether a record ends with them."""
        data = await self._stream.receive(max_bytes)
        if len(data) <= self._missing:
            self._missing -= len(data)
        else:
            self._count_records(self._head + data[self._missing :])
        return data

    def _count_records(self, data: bytes) -> None:
        start, end = 0, len(data)
        while start + _RECORD_HEAD <= end:
            start += _RECORD_HEAD + int.from_bytes(data[start + 3 : start + _RECORD_HEAD], "big")
        self._missing, self._head = (start - end, b"") if start >= end else (0, data[start:])


class Wired(NamedTuple):
    """A stream to an endpoint.

    Attributes:
        stream: To read from, and to write to.
        patient: To write to at length: where that is given up, or fails, it ends, and the reading goes on.
        link: Gives that up.
        has_read_ahead: Whether there is anything to read, the end too, that has left the socket: TLS and AnyIO read
            ahead.
        is_readable: Whether there is anything to read at the socket.
    """

    stream: ByteStream
    patient: ByteStream
    link: Link
    has_read_ahead: Callable[[], bool]
    is_readable: Callable[[], bool]


class _Proxy(Protocol):
    """A proxy, as far as opening a stream needs it."""

    address: tuple[str, int]

    async def passage(
        self, stream: ByteStream, origin: Origin, make_tls: MakeTls, looks: list[Callable[[], bool]], /
    ) -> tuple[ByteStream, Link | None]:
        """Turn a stream to the proxy into one to an endpoint."""
        ...


async def connect(origin: Origin, proxy: _Proxy | None, make_tls: MakeTls) -> Wired:
    """Open a stream to an endpoint.

    Raises:
        OSError: There is none, or its certificate is refused.
        anyio.BrokenResourceError: It broke at once.
    """
    scheme, host, port = origin
    first = await dial(*(proxy.address if proxy is not None else (host, port)))
    is_readable = _readable(first.extra(SocketAttribute.raw_socket))
    looks = _looks_at_anyio(first)
    try:
        stream: ByteStream = first
        link: Link | None = None
        if proxy is not None:
            stream, link = await proxy.passage(first, origin, make_tls, looks)
        if scheme == "https":
            stream, upper = await secured(stream, host, await make_tls(), looks)
            link = link or upper  # the lowest: what is above one that gives up sees nothing of it
        link = link or Link(stream)
        patient = link if stream is first else stream
        return Wired(stream, patient, link, _any(looks), is_readable)
    except BaseException:
        await anyio.aclose_forcefully(first)
        raise


async def secured(
    stream: ByteStream, host: str, tls: ssl.SSLContext, looks: list[Callable[[], bool]]
) -> tuple[TLSStream, Link]:
    """A stream with TLS, and the link below it.

    Args:
        stream: The stream.
        host: Whose certificate it has to be.
        tls: Whom to trust.
        looks: Ways to see whether there is something to read; one more is added.

    Raises:
        ssl.SSLError: The other side is not who it should be, or does not speak TLS.
    """
    link = _BelowTls(stream)
    # As in all of HTTP the end of an answer is told by its length, not by TLS.
    made = await TLSStream.wrap(link, server_side=False, hostname=host, ssl_context=tls, standard_compatible=False)
    looks.insert(0, _look_at_tls(made, link))
    return made, link


async def _write(sock: socket.socket, data: bytes) -> None:
    """Write to a socket that an event loop has for a stream whose own buffer is empty.

    Raises:
        OSError: The other side takes no more. What it has said can still be read.
    """
    own = _duplicate(sock)  # a loop does not let two wait for one
    try:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[own.send(rest[:_WRITTEN_BETWEEN_LOOKS]) :]
            except BlockingIOError:
                await anyio.wait_writable(own)
            else:
                await checkpoint()  # for whoever reads meanwhile
    finally:
        own.close()


def _duplicate(sock: socket.socket) -> socket.socket:
    try:
        own = sock.dup()
    except TypeError:  # that of uvloop is none
        own = socket.socket(fileno=os.dup(sock.fileno()))
    own.setblocking(False)
    return own


def _any(looks: list[Callable[[], bool]]) -> Callable[[], bool]:
    return looks[0] if len(looks) == 1 else lambda: any(look() for look in looks)


def _look_at_tls(stream: TLSStream, link: _BelowTls) -> Callable[[], bool]:
    """A function that tells whether TLS has bytes to read: decrypted ones, or others not decrypted yet."""
    read = stream.extra(TLSAttribute.ssl_object).read

    def has_news() -> bool:
        if link.is_within_a_record:
            return True
        try:
            read(1)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            pass  # it was closed, or cannot be read
        return True

    return has_news


def _looks_at_anyio(stream: SocketStream) -> list[Callable[[], bool]]:
    protocol: Any = getattr(stream, "_protocol", None)
    if protocol is None:
        return []  # on trio it does not read ahead
    return [protocol.read_event.is_set]  # while there is something, and once there is an end


def _readable(sock: socket.socket) -> Callable[[], bool]:
    """A function that tells whether a socket has bytes to read, or its end."""
    if sys.platform == "win32" or not hasattr(select, "poll"):
        return lambda: bool(select.select([sock], [], [], 0)[0])
    poll = cast("Any", select).poll()  # unlike `select`, it takes any number of a socket
    poll.register(sock, select.POLLIN)
    return lambda: bool(poll.poll(0))
