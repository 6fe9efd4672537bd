"""Applications on a real server: uvicorn, in a thread, on the loopback interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def on_uvicorn(app: Any, **options: Any) -> Iterator[str]:
    """Serve an application; gives its URL."""
    # No websockets: some versions warn of what they use of other people's.
    given = {"log_config": None, "timeout_graceful_shutdown": 5, "ws": "none", "loop": "asyncio", **options}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **given))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    give_up = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < give_up
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()
