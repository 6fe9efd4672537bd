"""Connections to hosts by their names."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from fractal._concurrency.gates import lookup_threads
from fractal._concurrency.threads import abandoned_threads
from fractal.models._http import dialing as _dialing
from fractal.models._http.dialing import dial

HOST = "several.invalid"
V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What hosts there are: their addresses by name."""
    found: dict[str, list[Any]] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host not in found:
            return look_up(host, port, *more, **named)
        families = [(V6 if ":" in address else V4, address) for address in found[host]]
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in families]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return found


@asynccontextmanager
async def listening() -> AsyncIterator[int]:
    """A server on 127.0.0.1; yields its port."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, anyio.aclose_forcefully)
        yield listener.extra(SocketAttribute.local_port)
        group.cancel_scope.cancel()


def dialing(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> list[SocketStream]:
    """Have the attempts at some addresses take so long, cancelled or not; returns all connections that are made."""
    made: list[SocketStream] = []
    connect = anyio.connect_tcp

    async def connect_tcp(address: str, port: int) -> SocketStream:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(seconds.get(address[-1:], 0))
            made.append(await connect("127.0.0.1", port))
            return made[-1]

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    return made


async def is_closed(stream: SocketStream) -> bool:
    try:
        await stream.send(b"x")
    except anyio.ClosedResourceError:
        return True
    except anyio.BrokenResourceError:
        return False
    return False


async def test_a_host_is_found_by_its_name_and_by_its_address():
    async with listening() as port:
        for host in ("localhost", "127.0.0.1"):
            await (await dial(host, port)).aclose()


async def test_a_host_that_there_is_not_is_an_error():
    with pytest.raises(OSError, match=r".+"):
        await dial("nowhere.invalid", 80)


async def test_addresses_come_in_turn_one_of_the_newer_kind_first(names: dict[str, list[Any]]):
    names[HOST] = ["127.0.0.1", "127.0.0.2", "127.0.0.1", "::2", "::3"]
    assert await _dialing._addresses_of(HOST, 80) == ["::2", "127.0.0.1", "127.0.0.2", "::3"]


async def test_the_next_address_is_tried_when_one_fails(names: dict[str, list[Any]]):
    async with listening() as port:
        names[HOST] = ["127.0.0.2", "127.0.0.1"]
        await (await dial(HOST, port)).aclose()


async def test_without_an_address_that_answers_all_that_was_tried_is_told(names: dict[str, list[Any]]):
    async with listening() as port:
        pass
    names[HOST] = ["127.0.0.2", "127.0.0.1"]
    with pytest.raises(OSError, match="All connection attempts failed") as caught:
        await dial(HOST, port)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 2


async def test_an_address_that_does_not_answer_keeps_the_next_one_waiting_for_a_moment_only(
    names: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_dialing, "HEAD_START", 0.01)
    names[HOST] = ["127.0.0.2", "127.0.0.1"]
    async with listening() as port:
        # Both come to a connection in the end; the second one before.
        made = dialing(monkeypatch, **{"2": 0.1, "1": 0.02})
        stream = await dial(HOST, port)
    assert stream is made[0]
    assert len(made) == 2
    assert [await is_closed(each) for each in made] == [False, True]
    await stream.aclose()


async def test_a_connection_that_comes_when_nobody_waits_for_it_is_closed(
    names: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
):
    names[HOST] = ["127.0.0.2", "127.0.0.1"]
    async with listening() as port:
        made = dialing(monkeypatch, **{"2": 0.1, "1": 0.1})
        with anyio.move_on_after(0.02) as scope:
            await dial(HOST, port)
    assert scope.cancelled_caught
    assert made
    assert all([await is_closed(each) for each in made])


async def test_a_look_up_that_hangs_is_left_at_once_and_keeps_its_place(monkeypatch: pytest.MonkeyPatch):
    began, release = threading.Event(), threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        began.set()
        release.wait(10)
        raise socket.gaierror("too late")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with anyio.move_on_after(0.1) as scope:
        await dial("slow.invalid", 80)
    assert scope.cancelled_caught
    assert began.is_set()
    assert [each.name for each in abandoned_threads()] == ["the look-up of slow.invalid"]
    assert lookup_threads.held == 1
    release.set()
    with anyio.fail_after(5):
        while abandoned_threads():  # noqa: ASYNC110  # nobody tells the event loop
            await anyio.sleep(0.005)
    assert lookup_threads.held == 0
