"""Agents that are served, and what their tools have seen."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI

from fractal import BaseAgent, Delta, ModelRequest, Reply, tool
from fractal.serving import agent_router, serving_lifespan
from fractal.testing import ScriptedModel


class Words:
    """A model that streams a text word by word."""

    def __init__(self, text: str, *, pause: float = 0.0) -> None:
        self._text, self._pause = text, pause

    async def respond(self, request: ModelRequest) -> Reply:
        return Reply(text=self._text)

    async def stream(self, request: ModelRequest, sink: Callable[[Delta], Awaitable[None]]) -> Reply:
        for word in re.findall(r"\S+\s*", self._text):
            await sink(Delta("text", word))
            await anyio.sleep(self._pause)
        return Reply(text=self._text)


class Shop(BaseAgent):
    """An agent with a tool that goes on until it is let go, and one that needs approval."""

    def __init__(self, *answers: Any, **options: Any) -> None:
        super().__init__("Shop", "a secret prompt", client=ScriptedModel([*answers]), **options)
        self.searching, self.cleaned_up, self.let_go = anyio.Event(), anyio.Event(), anyio.Event()
        self.paid: list[dict[str, Any]] = []

    @tool
    async def search(self) -> str:
        """Search."""
        self.searching.set()
        try:
            await self.let_go.wait()
        finally:
            self.cleaned_up.set()
        return "found"

    @tool(requires_approval=True)
    async def pay(self, euros: int, to: str = "me") -> str:
        """Pay."""
        self.paid.append({"euros": euros, "to": to})
        return f"paid {euros}"


@asynccontextmanager
async def served(agents: Any, *, grace: float = 5.0, lifespan: bool = True, **options: Any) -> AsyncIterator[FastAPI]:
    """An application that serves agents, from its start to its end."""
    app = FastAPI(lifespan=serving_lifespan(agents, grace=grace) if lifespan else None)
    app.include_router(agent_router(agents, **options))
    with anyio.fail_after(20):
        async with app.router.lifespan_context(app):
            yield app
