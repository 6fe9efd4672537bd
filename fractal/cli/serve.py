"""`fractal serve`: agents behind HTTP, with a chat page."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import threading
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from fractal.agent import BaseAgent
from fractal.cli.door import say, tell
from fractal.cli.which_agent import WrongUse

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["Address", "serve_agents"]

_GRACE = 5
"""Seconds that answers may go on after Ctrl-C, and then detached runs."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where to listen, and for whom.

    Attributes:
        host: Name or number of the interface.
        port: The port; 0 for a free one.
        token: The token that clients have to send; None: that of `FRACTAL_TOKEN`, or none.
        is_open: Whether everybody is meant to be let in.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    is_open: bool = False

    def checked_token(self) -> str | None:
        """The token that clients have to send; None for none.

        Raises:
            WrongUse: Nobody has said so, and others than this machine reach it; or it has been said twice.
        """
        token = self.token or os.environ.get("FRACTAL_TOKEN") or None
        if self.is_open and self.token:
            raise WrongUse("give --token or --no-token, not both")
        if self.is_open:
            return None
        if token is None and not _is_own(self.host):
            raise WrongUse(
                f"--host {self.host}: others can reach that: say with --token (or FRACTAL_TOKEN) what they have to"
                " know, or with --no-token that everybody may use the agents"
            )
        return token


def serve_agents(
    agents: Mapping[str, object],
    address: Address,
    *,
    on_disconnect: Literal["cancel", "detach"] = "detach",
    timeout: float | None = None,
    opens: bool = False,
) -> None:
    """Serve agents until Ctrl-C.

    Args:
        agents: The agents by name.
        address: Where.
        on_disconnect: What becomes of a run whose client has gone.
        timeout: Seconds a run may take; None: five minutes.
        opens: Whether to open the page in a browser.

    Raises:
        WrongUse: It cannot be served so.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise WrongUse(f"{' and '.join(missing)} must be here: pip install 'fractal-anyio[fastapi]'")
    from fractal.serving.app import serving_app

    token = address.checked_token()
    hosts = ("127.0.0.1", "localhost", "::1", address.host) if token is None and _is_own(address.host) else None
    options: dict[str, Any] = {"on_disconnect": on_disconnect}
    if timeout is not None:
        options["timeout"] = timeout
    app = serving_app(_awaited(agents), token=token, hosts=hosts, grace=_GRACE, **options)
    with _listening(address) as listener:
        url = f"http://{_shown(address.host)}:{listener.getsockname()[1]}/"
        page = url + (f"?token={quote(token, safe='')}" if token else "")

        def begun() -> None:
            say(f"{', '.join(agents)} at {page}")
            say(f"for OpenAI's clients {url}v1, for programs {url}runs, described by {url}openapi.json")
            if token is None and not _is_own(address.host):
                tell("fractal serve: everybody who reaches this address can use the agents")
            if opens:
                threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()

        with suppress(KeyboardInterrupt):  # the way in which it is meant to end
            _server(app, begun).run(sockets=[listener])


def _awaited(agents: Mapping[str, object]) -> dict[str, BaseAgent[Any]]:
    found = dict[str, BaseAgent[Any]]()
    for name, agent in agents.items():
        if not isinstance(agent, BaseAgent):
            raise WrongUse(f"agent {name!r} is one whose calls block: serve a fractal.BaseAgent")
        found[name] = agent
    return found


def _server(app: FastAPI, begun: Callable[[], None]) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                begun()

    # The log of requests would have the token in it.
    return Server(
        uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=_GRACE)
    )


def _listening(address: Address) -> socket.socket:
    """A socket that is bound to the address."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        raise WrongUse(f"--host {address.host} --port {address.port}: {error.strerror or error}") from None


def _is_own(host: str) -> bool:
    """Whether only this machine reaches an interface."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    """A host as it is written in an address; for all interfaces one that a browser here can open."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1" if host != "::" else "[::1]"
    return f"[{host}]" if ":" in host else host
