"""No test reaches a real endpoint by accident."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import ipaddress
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

from fractal.errors import InvalidArguments
from fractal.models._secrets import without_secrets
from fractal.testing.endpoint import endpoint_ports

__all__ = ["RealRequestBlocked", "block_real_requests"]


class RealRequestBlocked(BaseException):
    """A model wanted to reach something else than this machine.

    Like Ctrl-C it is no `Exception`: no retry, fallback or tool shall make an answer of it.

    Attributes:
        url: What was to be reached; without what may be secret, such as the query.
    """

    def __init__(self, url: str, allowed: str = "loopback addresses") -> None:
        super().__init__(url, allowed)
        self.url = url

    def __str__(self) -> str:
        return f"a request to {self.args[0]} was blocked: here only {self.args[1]} may be reached"


@contextmanager
def block_real_requests(*, allow: Literal["loopback", "endpoints"] = "loopback") -> Generator[list[str]]:
    """Let no model reach anything but this machine while the block lasts.

    It sees what goes through our own connections, and through httpx2 and httpx, which all `openai` clients use, and
    through aiohttp; in all threads and event loops of the process. Nothing is sent: the run raises `RealRequestBlocked`
    in its place.

    Args:
        allow: What may be reached: `"loopback"`, any address of this machine; `"endpoints"`, only a
            `fractal.testing.Endpoint` that runs.

    Returns:
        The URLs that were blocked, as they come.

    Raises:
        InvalidArguments: There is nothing of that name to allow.

    Example:
        >>> import anyio
        >>> from fractal import BaseAgent, OpenAIModel
        >>> from fractal.testing import RealRequestBlocked, block_real_requests
        >>> agent = BaseAgent("A", "a", client=OpenAIModel(base_url="https://models.example/v1", api_key="any"))
        >>> with block_real_requests():
        ...     try:
        ...         result = anyio.run(agent.run, "hi")
        ...     except RealRequestBlocked as error:
        ...         print(error.url)
        https://models.example/v1/chat/completions
    """
    if allow not in ("loopback", "endpoints"):
        raise InvalidArguments(f'allow={allow!r}: it is "loopback" or "endpoints"')
    _guard()
    block = _Block(allow)
    _blocks.append(block)
    try:
        yield block.urls
    finally:
        _blocks.remove(block)


class _Block:
    def __init__(self, allow: str) -> None:
        self._allow = allow
        self.urls: list[str] = []

    def ask(self, url: Any) -> None:
        """Let a request pass, or not."""
        if self._allow == "endpoints":
            if _is_loopback(url.host) and url.port in endpoint_ports():
                return
            allowed = "endpoints of fractal.testing"
        else:
            if _is_loopback(url.host):
                return
            allowed = "loopback addresses"
        shown = without_secrets(url)
        self.urls.append(shown)
        raise RealRequestBlocked(shown, allowed)


_blocks: list[_Block] = []


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@functools.cache
def _guard() -> None:
    """Have all ways to an endpoint ask before they send; outside of a block the answer is always yes."""
    from fractal.models._connections import Connections

    _ask_first(Connections, "send")
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name) is not None:
            http = importlib.import_module(name)
            # Below the clients: their redirects come by here too, and transports that only play an endpoint do not.
            _ask_first(http.AsyncHTTPTransport, "handle_async_request")
            _ask_first(http.HTTPTransport, "handle_request")
    if importlib.util.find_spec("aiohttp") is not None:
        _ask_first(importlib.import_module("aiohttp").TCPConnector, "connect")


def _ask_first(owner: type, method: str) -> None:
    send: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(send)
    def asking(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
        for block in _blocks[:]:
            # What our own connections send is a template, made of the request that has the URL.
            block.ask(getattr(request, "request", request).url)
        return send(self, request, *arguments, **named)

    setattr(owner, method, asking)
