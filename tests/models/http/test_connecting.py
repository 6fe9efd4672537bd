"""What is written to a connection at once, and what has to wait."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute

from fractal.models._http.connecting import WRITTEN_AT_ONCE, Link

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there nothing is written at once")

PIECE = bytes(range(256)) * 1024


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, socket.socket]]:
    """A link whose socket takes little, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = await anyio.connect_tcp("127.0.0.1", server.getsockname()[1])
        stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        other, _ = server.accept()
        async with stream:
            with other:
                yield Link(stream), other


async def filled(link: Link) -> bytes:
    """Write until nothing more is taken, which the system may see a little later than at once; returns what was."""
    taken, full = b"", 0
    while full < 20 and not link.is_cut:
        rest = link.send_at_once(PIECE)
        taken += PIECE[: len(PIECE) - len(rest)]
        full = full + 1 if rest == PIECE else 0
        await anyio.sleep(0.001)
    return taken


@pytest.mark.parametrize("size", [100, WRITTEN_AT_ONCE, len(PIECE)])
async def test_what_is_left_of_a_write_goes_on_however_short_it_is(size: int):
    async with linked() as (link, other):
        whole = await filled(link) + PIECE[:size]
        read = b""
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(link.send, PIECE[:size])
                while len(read) < len(whole):
                    await anyio.wait_readable(other)
                    read += other.recv(65536)
        assert read == whole
        assert not link.is_cut


@pytest.mark.parametrize("size", [100, WRITTEN_AT_ONCE, len(PIECE)])
async def test_a_rest_that_nobody_takes_leaves_what_was_said_to_be_read(size: int):
    async with linked() as (link, other):

        async def write() -> None:
            await link.send(PIECE[:size])
            while not link.is_cut:  # a busy system has found room for it after all
                await filled(link)
                await link.send(PIECE[:size])

        await filled(link)
        async with anyio.create_task_group() as group:
            group.start_soon(write)
            await anyio.wait_all_tasks_blocked()
            other.sendall(b"too much")
            other.close()  # which resets it: there is something that it has not read
        assert link.is_cut
        assert await link.receive() == b"too much"


async def test_nothing_is_left_for_another_side_that_takes_no_more():
    async with linked() as (link, other):
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
        with anyio.fail_after(20):
            while not link.is_cut:
                link.send_at_once(b"x")
                await anyio.sleep(0.001)
        assert link.send_at_once(PIECE) == b""
