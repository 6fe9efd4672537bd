"""asyncio and trio are equals: the same run tells the same of itself on both, and asks its endpoint for the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

import fractal
from fractal import BaseAgent, tool
from fractal.testing import Endpoint, answers, record_events

StartEndpoint = Callable[..., Endpoint]
PACKAGE = Path(fractal.__file__).parent


def play(request: Any) -> Any:
    """Call all tools that there are, once; then answer."""
    if not request.tools or request.messages[-1]["role"] == "tool":
        return answers.text("an answer", usage=(10, 2))
    names = [each["function"]["name"] for each in request.tools]
    calls = [answers.call(name, {"query": "?"} if name.startswith("delegate") else {}, id=name) for name in names]
    return answers.calls(*calls, usage=(20, 4))


def at_once() -> str:
    """Return at once, from a thread."""
    return "here"


async def soon() -> str:
    """Return soon."""
    await anyio.sleep(0)
    return "there"


async def fails() -> None:
    """Fail."""
    raise LookupError("nowhere")


@tool(timeout=0.1)
async def goes_on() -> None:
    """Go on until it is cut."""
    await anyio.sleep_forever()


def without_seconds(value: object) -> str:
    """How long a call was at work is in its text, and differs."""
    return re.sub(r"after [\d.]+ s", "after … s", str(value))


def account(on: str, one: Endpoint) -> dict[str, Any]:
    """All that a run tells: its result, the events of each agent, and its requests; without times and ids."""
    with record_events() as events:
        helper = BaseAgent("Helper", "You help.").add_tool(soon)
        boss = BaseAgent("Boss", "You ask.").register_delegate(helper)
        for function in (at_once, soon, fails, goes_on):
            boss.add_tool(function)
        result = anyio.run(boss.run, "go", backend=on)
    told: dict[str, list[str]] = {}
    for event in events:
        told.setdefault(event.agent_name, []).append(event.kind)
    return {
        "messages": without_seconds(result.messages),
        "outcomes": [(each.tool_name, each.outcome, each.content) for each in result.tool_results],
        "usage": result.usage,
        "end": (result.content, result.stop_reason, result.warnings),
        "events": {agent: sorted(kinds) for agent, kinds in told.items()},  # what is at once may come in either order
        "requests": sorted(without_seconds(request.body["messages"]) for request in one.requests),
    }


def test_a_run_tells_the_same_on_both(endpoint: StartEndpoint) -> None:
    on_asyncio, on_trio = (account(on, endpoint(play)) for on in ("asyncio", "trio"))
    assert [outcome for _, outcome, _ in on_asyncio["outcomes"]] == ["ok", "ok", "ok", "error", "timeout"]
    assert on_asyncio == on_trio


def test_the_library_imports_no_event_loop_of_its_own_choice() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(import|from) (asyncio|trio)\b", path.read_text("utf-8"), re.MULTILINE)
    }
    assert {name.partition("/")[0] for name in found} <= {"testing"}
