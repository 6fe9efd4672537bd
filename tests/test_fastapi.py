"""Endpoints that end with their client: `fractal.fastapi`, asked as a server asks, on every backend."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Request

from fractal import BaseAgent, tool
from fractal.fastapi import CLIENT_HAS_GONE, ends_with_client
from fractal.testing import ScriptedModel, answers


class Visit:
    """One request to an application, from a client that can leave."""

    def __init__(self, path: str = "/", body: bytes = b"{}", pieces: int = 1) -> None:
        size = -(-len(body) // pieces)
        self._body = [body[start : start + size] for start in range(0, len(body), size)]
        self._path = path
        self.left = anyio.Event()
        self.sent: list[Any] = []

    async def to(self, app: Callable[..., Awaitable[None]]) -> None:
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        address = {"path": self._path, "raw_path": self._path.encode(), "query_string": b"", "root_path": ""}
        headers = [(b"content-type", b"application/json")]
        await app({**scope, **address, "scheme": "http", "headers": headers}, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        await anyio.lowlevel.checkpoint()
        if self._body and not self.left.is_set():
            piece = self._body.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._body)}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def answer(self) -> Any:
        return json.loads(b"".join(message["body"] for message in self.sent[1:]))


class Shop:
    """An application with an agent whose tool can be watched."""

    def __init__(self, *, middleware: bool = False) -> None:
        self.begun, self.cleaned_up = anyio.Event(), anyio.Event()
        self.results: list[Any] = []
        self.app = FastAPI()
        self.app.post("/slow")(self.slow)
        self.app.post("/quick")(self.quick)
        self.app.post("/read")(self.read)
        self.app.post("/fail")(self.fail)
        if middleware:
            self.app.middleware("http")(self.passing)

    async def passing(self, request: Request, go_on: Callable[[Request], Awaitable[Any]]) -> Any:
        return await go_on(request)

    async def slow(self, request: Request, body: dict[str, Any]) -> Any:
        @tool
        async def search() -> None:
            self.begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                self.cleaned_up.set()

        agent = BaseAgent("A", "a", client=ScriptedModel([answers.call("search")]), observers=[self.results.append])
        async with ends_with_client(request):
            return (await agent.add_tool(search).run("go")).content

    async def quick(self, request: Request) -> Any:
        async with ends_with_client(request):
            return (await BaseAgent("A", "a", client=ScriptedModel(["done"])).run("go")).content

    async def read(self, request: Request) -> Any:
        self.begun.set()
        async with ends_with_client(request):
            return await request.json()

    async def fail(self, request: Request) -> Any:
        async with ends_with_client(request):
            try:
                raise KeyError("deep")
            except KeyError as error:
                raise ValueError("odd") from error


@pytest.mark.parametrize("middleware", [False, True], ids=["bare", "behind middleware"])
async def test_a_run_ends_when_its_client_leaves_and_is_a_499(middleware: bool) -> None:
    shop, visit = Shop(middleware=middleware), Visit("/slow")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(visit.to, shop.app)
            await shop.begun.wait()
            visit.left.set()
    assert shop.cleaned_up.is_set()
    assert [event.result.stop_reason for event in shop.results if event.kind == "run_finished"] == ["cancelled"]
    assert visit.sent == [] or visit.status == CLIENT_HAS_GONE == 499  # the middleware sends nothing to nobody


async def test_a_client_that_stays_gets_the_answer() -> None:
    visit = Visit("/quick")
    with anyio.fail_after(5):
        await visit.to(Shop().app)
    assert (visit.status, visit.answer) == (200, "done")


@pytest.mark.parametrize("pieces", [1, 3])
async def test_the_body_can_be_read_in_the_block(pieces: int) -> None:
    visit = Visit("/read", b'{"a": 1}', pieces)
    with anyio.fail_after(5):
        await visit.to(Shop().app)
    assert (visit.status, visit.answer) == (200, {"a": 1})


async def test_a_client_that_leaves_before_its_body_has_come_is_a_499() -> None:
    shop, visit = Shop(), Visit("/read", b'{"a": 1}', 2)
    visit.left.set()
    with anyio.fail_after(5):
        await visit.to(shop.app)
    assert visit.status == 499


async def test_a_body_that_was_read_piece_by_piece_is_no_trouble() -> None:
    app, visit = FastAPI(), Visit("/", b'{"a": 1}', 2)

    @app.post("/")
    async def upload(request: Request) -> int:
        read = [piece async for piece in request.stream()]
        async with ends_with_client(request):
            return len(b"".join(read))

    with anyio.fail_after(5):
        await visit.to(app)
    assert visit.answer == 8


async def test_an_error_of_the_block_comes_out_alone_and_with_its_cause() -> None:
    with anyio.fail_after(5), pytest.raises(ValueError, match="odd") as caught:
        await Visit("/fail").to(Shop().app)
    assert isinstance(caught.value.__cause__, KeyError)


async def test_cancellation_from_outside_is_none_of_the_client() -> None:
    shop, visit = Shop(), Visit("/slow")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(visit.to, shop.app)
            await shop.begun.wait()
            group.cancel_scope.cancel()
    assert shop.cleaned_up.is_set()
    assert visit.sent == []
