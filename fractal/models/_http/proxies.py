"""The proxies of the environment: which of them is for which URL, and the way through each.

The variables mean what they mean to httpx2, whose connections are not used: what is kept to here, that a connection is
used again only when nothing is left on it, say, is kept to behind a proxy too.
"""

from __future__ import annotations

import base64
import ipaddress
from typing import TYPE_CHECKING, NoReturn
from urllib.request import getproxies

import h11
import httpx2

from fractal.errors import ConnectionFailed
from fractal.models._http.connecting import LAST_PORT, PORTS, secured
from fractal.models._http.incoming import Incoming
from fractal.models._secrets import without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import ByteStream

    from fractal.models._http.connecting import Link, MakeTls, Origin

__all__ = ["Proxies", "Proxy"]

_PORTS = PORTS | {"socks5": 1080, "socks5h": 1080}
_REFUSALS_THAT_PASS = (408, 429)  # and all from 500 up


class Proxies:
    """The proxies that the environment names."""

    def __init__(self) -> None:
        named = getproxies()
        self._urls = {scheme: named[scheme] for scheme in ("http", "https", "all") if named.get(scheme)}
        exempt = [entry.strip() for entry in named.get("no", "").split(",")]
        self._exempt = [_Exempt(entry) for entry in exempt if entry]
        self._made: dict[str, Proxy] = {}

    def for_url(self, url: httpx2.URL) -> Proxy | None:
        """The proxy for a URL; None if there is none.

        Raises:
            ConnectionFailed: There is one that cannot be used.
        """
        named = self._urls.get(url.scheme) or self._urls.get("all")
        if not named or any(exempt.covers(url) for exempt in self._exempt):
            return None
        if named not in self._made:
            self._made[named] = Proxy(named)
        return self._made[named]


class Proxy:
    """A proxy and its protocol.

    Args:
        url: The proxy, with its user and password if it has some; without a scheme it is one of http.

    Raises:
        ConnectionFailed: No proxy can be asked at that URL.

    Attributes:
        address: Its host and port.
        authorization: The header that says who asks; None if nobody has to.
        secrets: What no error may repeat.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx2.Proxy(url if "://" in url else f"http://{url}")
            self._scheme, host, port = parsed.url.scheme, parsed.url.host, parsed.url.port
            user, password = parsed.auth or ("", "")
            if port is not None and not 0 < port <= LAST_PORT:
                raise ValueError
        except (ValueError, httpx2.InvalidURL):
            self._fail(f"cannot be used: {without_secrets(url)!r}, give one like http://host:3128")
        if not host:
            self._fail(f"has no host: {without_secrets(url)!r}")
        self.address = host, port or _PORTS[self._scheme]
        self._credentials = (user.encode(), password.encode()) if user or password else None
        token = base64.b64encode(f"{user}:{password}".encode())
        self.authorization = b"Basic " + token if self._credentials else None
        self.secrets = (password or user, token.decode()) if self._credentials else ()

    def forwards(self, scheme: str) -> bool:
        """Whether the proxy gets the request itself, with the whole URL, rather than a request for a tunnel."""
        return scheme == "http" and not self._scheme.startswith("socks")

    async def passage(
        self, stream: ByteStream, origin: Origin, make_tls: MakeTls, looks: list[Callable[[], bool]]
    ) -> tuple[ByteStream, Link | None]:
        """Turn a stream to the proxy into one to an endpoint.

        Args:
            stream: The stream.
            origin: The endpoint.
            make_tls: Whom to trust.
            looks: Ways to see whether there is something to read; those that come in between are added.

        Returns:
            The stream, and the link that its writing goes through, if there is one.

        Raises:
            ConnectionFailed: The proxy refuses.
            OSError: Its certificate is refused.
            anyio.EndOfStream: It has closed the stream.
            anyio.BrokenResourceError: The stream broke.
        """
        link: Link | None = None
        if self._scheme == "https":
            stream, link = await secured(stream, self.address[0], await make_tls(), looks)
        if self._scheme.startswith("socks"):
            await self._greet(stream)
            await self._ask_for(stream, origin)
        elif not self.forwards(origin[0]):
            await self._tunnel(stream, origin)
        return stream, link

    async def _tunnel(self, stream: ByteStream, origin: Origin) -> None:
        _, host, port = origin
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        headers = [("Host", target)]
        if self.authorization is not None:
            headers.append(("Proxy-Authorization", self.authorization.decode()))
        written = h11.Connection(h11.CLIENT).send(h11.Request(method="CONNECT", target=target, headers=headers))
        assert written is not None
        await stream.send(written)
        incoming = Incoming()
        incoming.expect(has_body=False)
        while incoming.head is None:
            incoming.feed(await stream.receive())
            if incoming.fault is not None:
                self._fail(f"did not answer: {incoming.fault}", again=True)
        status = incoming.head.status_code
        if not 200 <= status < 300:
            self._fail(f"answered HTTP {status}", again=status >= 500 or status in _REFUSALS_THAT_PASS)

    async def _greet(self, stream: ByteStream) -> None:
        """Agree on a method of authentication, and authenticate (SOCKS 5: RFC 1928, 1929)."""
        method = 0 if self._credentials is None else 2
        await stream.send(bytes((5, 1, method)))
        if tuple(await _exactly(stream, 2)) != (5, method):
            self._fail("takes no user and password" if method else "wants to know who asks")
        if self._credentials is not None:
            user, password = self._credentials
            await stream.send(b"\1" + self._counted(user, "a user") + self._counted(password, "a password"))
            if (await _exactly(stream, 2))[1] != 0:
                self._fail("does not take this user and password")

    async def _ask_for(self, stream: ByteStream, origin: Origin) -> None:
        _, host, port = origin
        await stream.send(b"\5\1\0" + self._address_of(host) + port.to_bytes(2, "big"))
        _, code, _, kind = await _exactly(stream, 4)
        if code != 0:
            self._fail(f"could not connect: its code is {code}", again=True)
        length = {1: 4, 4: 16}.get(kind) or (await _exactly(stream, 1))[0]
        await _exactly(stream, length + 2)  # where the proxy itself is now

    def _address_of(self, host: str) -> bytes:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return b"\3" + self._counted(host.encode("ascii"), "a host")
        return (b"\1" if address.version == 4 else b"\4") + address.packed

    def _counted(self, data: bytes, what: str) -> bytes:
        if len(data) > 255:
            self._fail(f"cannot be told of {what} of more than 255 bytes: SOCKS counts them in one")
        return bytes((len(data),)) + data

    def _fail(self, text: str, *, again: bool = False) -> NoReturn:
        where = f" {self.address[0]}:{self.address[1]}" if hasattr(self, "address") else ""
        fault = ConnectionFailed(f"the proxy{where} {text}")
        fault.retryable = again
        raise fault


class _Exempt:
    """One entry of NO_PROXY.

    Args:
        entry: The entry: `*`, a host with its subdomains or, after `.` or `*.`, its subdomains alone, an address, a
            network such as `10.0.0.0/8`, `localhost`; with a scheme before it or a port behind it, for that alone.
    """

    def __init__(self, entry: str) -> None:
        scheme, has_scheme, rest = entry.partition("://")
        self._scheme, rest = (scheme.lower(), rest) if has_scheme else ("all", entry)
        self._network = _network(rest)
        self._host, self._port = ("", None) if self._network else _host_and_port(rest.lower())
        # A scheme names one host, and so does an address.
        self._is_exact = bool(has_scheme) or self._host == "localhost"

    def covers(self, url: httpx2.URL) -> bool:
        """Whether a URL bypasses all proxies."""
        if self._scheme not in ("all", "", url.scheme) or self._port not in (None, url.port):
            return False
        host = _host_of(url)
        if self._network is not None:
            return _is_in(host, self._network)
        named = self._host.removeprefix("*")
        if not named:
            return True  # `*`, or a scheme
        if named.startswith("."):
            return host.endswith(named) and host != named
        return host == named or (not self._is_exact and host.endswith(f".{named}"))


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _network(text: str) -> _Network | None:
    address, slash, prefix = text.partition("/")
    address = address.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_network(f"{address}{slash}{prefix}", strict=False)
    except ValueError:
        return None


def _host_of(url: httpx2.URL) -> str:
    try:
        return url.host.lower()
    except ValueError:  # as it is written, if it cannot be shown to people
        return url.raw_host.decode("ascii")


def _is_in(host: str, network: _Network) -> bool:
    try:
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False


def _host_and_port(text: str) -> tuple[str, int | None]:
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.endswith("]")):
        return host.removeprefix("[").removesuffix("]"), int(port)
    return text.removeprefix("[").removesuffix("]"), None


async def _exactly(stream: ByteStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += await stream.receive(length - len(data))
    return data
