"""Proxies of the environment: which is asked for what, and that all that is promised holds behind them."""

from __future__ import annotations

import base64
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from fractal import AgentResult, BaseAgent, ConnectionFailed, ReplyBounds, ReplyTooLarge, StatusError
from fractal.models._http.proxies import Proxies
from tests.clients import ASYNC, OWN, Models
from tests.raw_server import Wire, body_of, http, raw_server, refused, said

KINDS = (OWN, ASYNC)
SECRET = base64.b64encode(b"ada:p@ss").decode()


async def asked(model: Any, text: str = "go") -> AgentResult:
    return await BaseAgent("A", "a", client=model).run(text, max_retries=0, timeout=20)


def pump(one: Wire, other: socket.socket) -> None:
    """Hand on what comes from either side, until one has no more to say."""
    with suppress(OSError), other:
        while True:
            for sock in select.select([one.sock, other], [], [], 5)[0]:
                data = sock.recv(65536)
                if not data:
                    return
                (other if sock is one.sock else one.sock).sendall(data)


def connects(wire: Wire) -> None:
    """A proxy that makes tunnels."""
    head = wire.request()
    assert head is not None
    host, _, port = head.split(b" ")[1].decode().rpartition(":")
    upstream = socket.create_connection((host.strip("[]"), int(port)))
    wire.send(b"HTTP/1.1 200 Connection established\r\nProxy-Agent: x\r\n\r\n")
    pump(wire, upstream)


def hello(wire: Wire) -> None:
    while wire.request():
        wire.send(said("hello"))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Models:
    """Makes models of each kind that has its connections from us."""
    return Models(request.param)


def through(proxy: Any, monkeypatch: pytest.MonkeyPatch, *, scheme: str = "http", user: str = "ada:p%40ss@") -> None:
    """Name a proxy for everything."""
    url = proxy.url.removesuffix("/v1").partition("//")[2]
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, f"{scheme}://{user}{url}")


async def test_a_proxy_is_asked_for_a_tunnel_to_https(
    model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    with raw_server(hello, tls) as server, raw_server(connects) as proxy:
        through(proxy, monkeypatch)
        one = model(server.url)
        for _ in range(3):
            assert (await asked(one)).content == "hello"
        [request] = proxy.requests
        port = server.url.rpartition(":")[2].removesuffix("/v1")
        assert request.startswith(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n".encode())
        assert f"Proxy-Authorization: Basic {SECRET}".encode() in request
        assert all(b"proxy" not in each.lower() for each in server.requests)
        assert len(server.wires) == 1


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
async def test_a_proxy_of_either_scheme_is_sent_what_goes_to_http(
    is_tls: bool, model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    with raw_server(hello, tls if is_tls else None) as proxy:
        through(proxy, monkeypatch, scheme="https" if is_tls else "http")
        one = model("http://elsewhere.invalid:8000/v1")
        for _ in range(2):
            assert (await asked(one)).content == "hello"
        first, second = proxy.requests
        assert first.startswith(b"POST http://elsewhere.invalid:8000/v1/chat/completions HTTP/1.1\r\n")
        assert b"\r\nHost: elsewhere.invalid:8000\r\n" in first.replace(b"host:", b"Host:")
        assert f"Proxy-Authorization: Basic {SECRET}".encode() in second
        assert len(proxy.wires) == 1


async def test_a_tunnel_goes_through_a_proxy_that_is_asked_over_tls(
    model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    def talk(wire: Wire) -> None:
        head = wire.request()
        assert head is not None
        port = int(head.split(b" ")[1].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
            upstream.settimeout(5)
            while data := wire.read():
                upstream.sendall(data)
                wait = 0.2
                with suppress(TimeoutError):
                    while True:
                        upstream.settimeout(wait)
                        back = upstream.recv(65536)
                        if not back:
                            return
                        wire.send(back)
                        wait = 0.05

    with raw_server(hello, tls) as server, raw_server(talk, tls) as proxy:
        through(proxy, monkeypatch, scheme="https")
        one = model(server.url)
        for _ in range(2):
            result = await asked(one)
            assert result.content == "hello", result.error
        assert len(server.wires) == 1


REFUSALS = [
    (refused("407 Proxy Authentication Required"), "HTTP 407", False),
    (refused("403 Forbidden"), "HTTP 403", False),
    (refused("502 Bad Gateway"), "HTTP 502", True),
    (b"SSH-2.0-x\r\n\r\n", "is no HTTP", True),
    (b"", "", True),
]


@pytest.mark.parametrize(("answer", "words", "retryable"), REFUSALS, ids=[words for _, words, _ in REFUSALS])
async def test_a_proxy_that_makes_no_tunnel_is_named(
    answer: bytes, words: str, retryable: bool, model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    def talk(wire: Wire) -> None:
        if wire.request():
            wire.send(answer)

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        error = (await asked(model("https://elsewhere.invalid/v1"))).exception
        assert isinstance(error, ConnectionFailed), repr(error)
        assert error.retryable is retryable
        assert words in str(error)
        assert SECRET not in str(error)


def socks(user: bytes = b"", password: bytes = b"", *, code: int = 0) -> Callable[[Wire], None]:
    """A proxy of SOCKS 5."""

    def exactly(wire: Wire, length: int) -> bytes:
        data = b""
        while len(data) < length:
            data += wire.sock.recv(length - len(data)) or wire.hang_up()
        return data

    def talk(wire: Wire) -> None:
        _, count = exactly(wire, 2)
        methods = exactly(wire, count)
        wanted = 2 if user else 0
        if wanted not in methods:
            wire.send(b"\x05\xff")
            return
        wire.send(bytes((5, wanted)))
        if user:
            _, length = exactly(wire, 2)
            named = exactly(wire, length)
            secret = exactly(wire, exactly(wire, 1)[0])
            wire.send(b"\x01\x00" if (named, secret) == (user, password) else b"\x01\x01")
        _, _, _, kind = exactly(wire, 4)
        host = exactly(wire, {1: 4, 4: 16}.get(kind) or exactly(wire, 1)[0])
        wire.requests.append(host)
        port = int.from_bytes(exactly(wire, 2), "big")
        wire.send(bytes((5, code, 0, 3, 4)) + b"host" + b"\0\0")
        if code == 0:
            pump(wire, socket.create_connection(("127.0.0.1", port)))

    return talk


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize("user", ["", "ada:p%40ss@"], ids=["nobody", "ada"])
async def test_a_proxy_of_socks_is_asked(
    scheme: str, user: str, model: Models, maybe_tls: ssl.SSLContext | None, monkeypatch: pytest.MonkeyPatch
):
    with raw_server(hello, maybe_tls) as server, raw_server(socks(*(b"ada", b"p@ss") if user else ())) as proxy:
        one, other = model(server.url), model(server.url.replace("127.0.0.1", "localhost"))
        through(proxy, monkeypatch, scheme=scheme, user=user)
        for _ in range(2):
            assert (await asked(one)).content == "hello"
        assert proxy.requests == [socket.inet_aton("127.0.0.1")]
        assert (await asked(other)).content == "hello"
        assert proxy.requests[-1] == b"localhost"


@pytest.mark.parametrize(
    ("talk", "user", "words"),
    [
        (socks(b"ada", b"other"), "ada:hunter22@", "does not take this user and password"),
        (socks(b"ada", b"other"), "", "wants to know who asks"),
        (socks(), "ada:hunter22@", "takes no user and password"),
        (socks(code=5), "", "could not connect: its code is 5"),
        (socks(b"ada", b"x"), f"ada:{'p' * 256}@", "cannot be told of a password of more than 255 bytes"),
        (socks(b"ada", b"x"), f"{'u' * 256}:pass@", "cannot be told of a user of more than 255 bytes"),
        (lambda wire: wire.sock.recv(100), "", "no connection"),
    ],
)
async def test_a_proxy_of_socks_that_refuses_is_named(
    talk: Callable[[Wire], None], user: str, words: str, model: Models, monkeypatch: pytest.MonkeyPatch
):
    with raw_server(talk) as proxy:
        one = model("http://elsewhere.invalid/v1")  # the SDK itself would look for a library for SOCKS
        through(proxy, monkeypatch, scheme="socks5", user=user)
        error = (await asked(one)).exception
        assert isinstance(error, ConnectionFailed), repr(error)
        assert words in str(error)
        assert "hunter22" not in str(error)


@pytest.mark.parametrize("url", ["http://h:99999", "ht!tp://h:1", "socks4://h:1", "http://", "ftp://h", "http://[::1"])
async def test_a_proxy_that_cannot_be_asked_is_a_clear_error(url: str, model: Models, monkeypatch: pytest.MonkeyPatch):
    one = model("http://elsewhere.invalid/v1")
    monkeypatch.setenv("all_proxy", url)
    error = (await asked(one)).exception
    assert isinstance(error, ConnectionFailed), repr(error)
    assert not error.retryable
    assert "the proxy" in str(error)


# ---- what holds without a proxy holds behind one


async def test_what_comes_behind_an_answer_of_a_proxy_is_no_answer(model: Models, monkeypatch: pytest.MonkeyPatch):
    def talk(wire: Wire) -> None:
        if wire.number == 0 and wire.request():
            wire.send(said("first"), said("unasked"))
            wire.read()
            return
        hello(wire)

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        one = model("http://elsewhere.invalid/v1")
        assert [(await asked(one)).content for _ in range(2)] == ["first", "hello"]


async def test_answers_of_a_proxy_are_bounded(model: Models, monkeypatch: pytest.MonkeyPatch):
    def talk(wire: Wire) -> None:
        while wire.request():
            wire.send(said("x", 100_000))

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        one = model("http://elsewhere.invalid/v1", bounds=ReplyBounds(body=50_000))
        assert isinstance((await asked(one)).exception, ReplyTooLarge)


async def test_the_head_of_a_proxys_answer_is_bounded(
    model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    def talk(wire: Wire) -> None:
        wire.request()
        wire.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            wire.send(b"X-More: " + b"x" * 60_000 + b"\r\n")

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        error = (await asked(model("https://elsewhere.invalid/v1"))).exception
        assert isinstance(error, ConnectionFailed), repr(error)


async def test_an_early_answer_of_a_proxy_is_read(model: Models, monkeypatch: pytest.MonkeyPatch):
    def talk(wire: Wire) -> None:
        wire.read()
        wire.send(refused("413 Content Too Large"))

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        result = await asked(model("http://elsewhere.invalid/v1"), "x" * (4 << 20))
        assert isinstance(result.exception, StatusError), result.error
        assert (result.exception.status, len(proxy.wires)) == (413, 1)


async def test_a_proxy_does_not_send_a_conversation_elsewhere(model: Models, monkeypatch: pytest.MonkeyPatch):
    def talk(wire: Wire) -> None:
        while wire.request():
            wire.send(http(b"", "Location: http://other.invalid/x", status="307 Moved"))

    with raw_server(talk) as proxy:
        through(proxy, monkeypatch)
        result = await asked(model("http://elsewhere.invalid/v1"))
        assert isinstance(result.exception, ConnectionFailed)
        assert len(proxy.requests) == 1
        assert body_of(proxy.requests[0])


# ---- which is asked


URLS = [
    "http://example.com/", "https://example.com/v1", "https://www.example.com", "https://wwwexample.com",
    "http://example.com:8080/", "http://127.0.0.1:8000/", "http://127.0.0.2/", "http://10.1.2.3/", "http://[::1]:80/",
    "http://[::1]:9/", "http://[fe80::1]/", "http://localhost:1/", "http://a.localhost/", "https://EXAMPLE.com",
    "http://a.b.example.com:8080", "http://192.168.1.1:8080",
]  # fmt: skip
DIRECT: dict[str, list[int]] = {
    "": [], "*": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], "example.com": [0, 1, 2, 4, 13, 14],
    ".example.com": [2, 14], "*.example.com": [2, 14], "example.com:8080": [4, 14], "127.0.0.1": [5],
    "127.0.0.1:8000": [5], "::1": [8, 9], "10.0.0.0/8": [7], "[::1]": [8, 9], "[::1]:9": [9], "::1/64": [8, 9],
    "fe80::/10": [10], "localhost": [11], "LOCALHOST": [11], ".localhost": [12], "localhost:1": [11],
    "com": [0, 1, 2, 3, 4, 13, 14], "http://example.com": [0, 4], "https://example.com": [1, 13],
    "all://example.com": [0, 1, 4, 13], "http://": [0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15],
    "http://example.com:8080": [4], "192.168.1.1": [15], "https://*.example.com": [2],
    "Example.COM": [0, 1, 2, 4, 13, 14], "foo, example.com ,bar": [0, 1, 2, 4, 13, 14], "10.0.0.0/99": [],
    "exam/ple": [], "*.com": [0, 1, 2, 3, 4, 13, 14],
}  # fmt: skip
"""For an entry of NO_PROXY which of the URLs go past the proxy: so it was with httpx2 2.16, whose rules these are."""


@pytest.mark.parametrize("exempt", DIRECT)
def test_a_proxy_is_asked_for_what_is_not_exempt(exempt: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("all_proxy", "http://one:1")
    monkeypatch.setenv("no_proxy", exempt)
    proxies = Proxies()
    assert [number for number, url in enumerate(URLS) if not proxies.for_url(httpx2.URL(url))] == DIRECT[exempt]


def test_each_scheme_has_its_proxy(monkeypatch: pytest.MonkeyPatch):
    for named, asked_for in (
        ({"http_proxy": "http://one:1", "https_proxy": "two:2"}, ("one", "two")),
        ({"http_proxy": "http://one", "all_proxy": "http://three:3"}, ("one", "three")),
        ({"https_proxy": "http://two:2"}, (None, "two")),
        ({}, (None, None)),
    ):
        with monkeypatch.context() as patch:
            for name, value in named.items():
                patch.setenv(name, value)
            found = [Proxies().for_url(httpx2.URL(f"{scheme}://host/v1")) for scheme in ("http", "https")]
            assert tuple(each and each.address[0] for each in found) == asked_for


async def test_an_early_answer_of_a_proxy_that_is_asked_over_tls_is_read(
    model: Models, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
):
    def talk(wire: Wire) -> None:
        wire.read()
        wire.send(refused("413 Content Too Large"))

    with raw_server(talk, tls) as proxy:
        through(proxy, monkeypatch, scheme="https")
        result = await asked(model("http://elsewhere.invalid/v1"), "x" * (4 << 20))
        assert isinstance(result.exception, StatusError), result.error
        assert (result.exception.status, len(proxy.wires)) == (413, 1)
