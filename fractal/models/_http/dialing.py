"""A connection to a host by its name, as `anyio.connect_tcp` makes one, but for the thread that looks the name up.

On asyncio that thread would be one of the loop's own: the loop and the process wait at their ends for a look-up that
nobody waits for any more.
"""

from __future__ import annotations

import ipaddress
import socket
from functools import partial
from typing import TYPE_CHECKING

import anyio

from fractal._concurrency.background import Unstarted
from fractal._concurrency.gates import lookup_threads
from fractal._concurrency.threads import ThreadCall

if TYPE_CHECKING:
    from anyio.abc import SocketStream

__all__ = ["dial"]

HEAD_START = 0.25
"""Seconds that the attempt at one address has before the next address is tried as well."""


async def dial(host: str, port: int) -> SocketStream:
    """Connect to a host, by the first of its addresses that answers.

    Args:
        host: Its name or address.
        port: The port.

    Raises:
        OSError: There is no such host, or none of its addresses answers.
        ValueError: That is no name of a host.
    """
    addresses = [host] if _is_address(host) else await _addresses_of(host, port)
    return await (anyio.connect_tcp(addresses[0], port) if len(addresses) == 1 else _first_of(addresses, port))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a host: one of IPv6 first, then one of IPv4, then the others."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await ThreadCall(look_up, f"the look-up of {host}", threads=lookup_threads, abandon=True).run()
    by_family: dict[socket.AddressFamily, list[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append(str(address[0]))
    newer, older = by_family.get(socket.AF_INET6, []), by_family.get(socket.AF_INET, [])
    return list(dict.fromkeys([*newer[:1], *older, *newer[1:]]))


async def _first_of(addresses: list[str], port: int) -> SocketStream:
    connected: list[SocketStream] = []
    errors: list[OSError] = []

    async def attempt(address: str, is_over: anyio.Event) -> None:
        try:
            connected.append(await anyio.connect_tcp(address, port))
            group.cancel_scope.cancel()
        except OSError as error:
            errors.append(error)
        finally:
            is_over.set()

    try:
        async with anyio.create_task_group() as group:
            for address in addresses:
                is_over = anyio.Event()
                group.start_soon(Unstarted, attempt, address, is_over, name="fractal dialing")
                with anyio.move_on_after(HEAD_START):
                    await is_over.wait()
    except BaseException:
        for stream in connected:
            await anyio.aclose_forcefully(stream)
        raise
    for too_late in connected[1:]:
        await anyio.aclose_forcefully(too_late)
    if connected:
        return connected[0]
    raise OSError("All connection attempts failed") from ExceptionGroup("none of its addresses answers", errors)
