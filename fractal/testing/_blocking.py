"""No test reaches a real endpoint by accident."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import ipaddress
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from fractal.errors import InvalidArguments
from fractal.models._secrets import without_secrets
from fractal.testing._patching import Patch
from fractal.testing.endpoint import endpoint_ports

__all__ = ["RealRequestBlocked", "block_real_requests"]


class RealRequestBlocked(BaseException):
    """A model tried to reach another machine.

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
    in its place. What it puts in the place of methods of these libraries is taken back at the end.

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
    block = _Block(allow)
    with ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        _blocks.append(block)
        stack.callback(_blocks.remove, block)
        yield block.urls


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
def _patches() -> list[Patch]:
    """The patches that make every way to an endpoint ask before it sends."""
    from fractal.models._http.connections import Connections

    found = [Patch(Connections, "send", _ask_first)]
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name) is not None:
            http = importlib.import_module(name)
            # Below the clients: their redirects come by here too, and transports that only play an endpoint do not.
            found.append(Patch(http.AsyncHTTPTransport, "handle_async_request", _ask_first))
            found.append(Patch(http.HTTPTransport, "handle_request", _ask_first))
    if importlib.util.find_spec("aiohttp") is not None:
        found.append(Patch(importlib.import_module("aiohttp").TCPConnector, "connect", _ask_first))
    return found


def _ask_first(send: Callable[..., Any], sender: Any, request: Any, *arguments: Any, **named: Any) -> Any:
    for block in _blocks[:]:
        # What our own connections send is a template, made of the request that has the URL.
        block.ask(getattr(request, "request", request).url)
    return send(sender, request, *arguments, **named)
