"""What tests of a trace's page need: events by hand, those of a run, and a look into the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import anyio

from fractal import BaseAgent, TraceEvent, TracingKit
from fractal.testing import ScriptedModel, answers

AT = 1_800_000_000.0
HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> \u2028 \u2029 \u202e javascript:alert(1) & '\""
)


def told(kind: str, at: float = 0.0, **values: Any) -> TraceEvent:
    metadata = {"run": "r", **values.pop("metadata", {})}
    return TraceEvent(
        **{"timestamp": AT + at, "event_type": kind, "agent_name": "A", "run_id": "r", **values}, metadata=metadata
    )


class Scripts(HTMLParser):
    """The scripts of a page, as a browser finds them: by type, id and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.policy = ""
        self._now: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag == "script":
            assert "src" not in given
            self._now = given.get("type") or "", given.get("id") or ""

    def handle_data(self, data: str) -> None:
        if self._now is not None:
            self.found.append((*self._now, data))

    def handle_endtag(self, tag: str) -> None:
        self._now = None

    @property
    def data(self) -> dict[str, Any]:
        return {name: json.loads(text) for kind, name, text in self.found if kind == "application/json"}


async def search(query: str) -> str:
    """Search."""
    if query == "nothing":
        raise LookupError("nothing there")
    return f"found {query}"


def real() -> list[TraceEvent]:
    kit = TracingKit()
    below = BaseAgent("Below", "b", "small", ScriptedModel([answers.call("search", {"query": "nothing"}), "deep"]))
    calls = [answers.call("search", {"query": "x"}), answers.call("ask", {"query": "why?"})]
    agent = BaseAgent("Chief", "You lead.", "large", ScriptedModel([answers.calls(*calls), "done"]), observers=[kit])
    agent.add_tool(search).register_delegate(below.add_tool(search), tool_name="ask")
    assert anyio.run(agent.run, "go on").success
    return kit.get_trace()
