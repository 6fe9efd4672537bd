"""`fractal demo`: a planner with two specialists, watched while they work, and what is left when they are done."""

from __future__ import annotations

import inspect
import json
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from fractal._concurrency.stuck import line_in_thread
from fractal._concurrency.workers import THREAD_NAME
from fractal._json import text_of
from fractal._texts import one_line, printable
from fractal._views.terminal import WIDEST, look_of, result_table, timeline, watch
from fractal._views.tree import RunTree
from fractal.agent import BaseAgent
from fractal.cli.door import say
from fractal.cli.serve import Address, serve_agents
from fractal.cli.stand_in import without_proxy
from fractal.cli.visualize import write_page
from fractal.models.openai import OpenAIModel
from fractal.testing import answers
from fractal.testing.endpoint import Endpoint, RecordedRequest
from fractal.toolkit import tool
from fractal.tracing import TracingKit

if TYPE_CHECKING:
    from fractal.model import Model
    from fractal.results import AgentResult

__all__ = ["Backend", "run_demo", "serve_demo"]

Backend = Literal["asyncio", "trio"]

QUESTION = "One day in Rome: two sights in the morning, dinner in Trastevere."

_LONGEST_WAIT = 1.0
"""Seconds that connections and worker threads have to notice that the event loop has ended."""


def opening_hours(sight: str) -> dict[str, str]:
    """Look up when a sight is open today.

    Args:
        sight: Name of the sight.
    """
    time.sleep(0.6)  # a blocking client, say; it has a worker thread
    return {"sight": sight, "open": "9:00 to 19:00" if "Borghese" in sight else "8:30 to 18:30"}


async def walking_time(start: str, end: str) -> str:
    """Tell how long one walks between two places.

    Args:
        start: Where from.
        end: Where to.
    """
    await anyio.sleep(0.4)
    return f"35 minutes from {start} to {end}"


@tool(timeout=0.7)
async def queue_camera(sight: str) -> str:
    """See how long the queue in front of a sight is now.

    Args:
        sight: Name of the sight.
    """
    await anyio.sleep(60)  # the camera is down, and nobody waits for it longer than the timeout
    return f"no queue at {sight}"


def free_tables(area: str, people: int) -> list[str]:
    """Find restaurants with a free table tonight.

    Args:
        area: Part of the town.
        people: How many will come.
    """
    time.sleep(0.8)
    return [f"Da Enzo ({area}, {people} seats, 20:30)", f"Tonnarello ({area}, {people} seats, 21:15)"]


async def menu_today(restaurant: str) -> str:
    """Read what a restaurant cooks today.

    Args:
        restaurant: Its name.
    """
    await anyio.sleep(0.5)
    return {"Da Enzo": "cacio e pepe, artichokes"}.get(restaurant, "amatriciana, tiramisù")


_SIGHTS: tuple[Callable[..., Any], ...] = (opening_hours, walking_time, queue_camera)
_FOOD: tuple[Callable[..., Any], ...] = (free_tables, menu_today)
_NOTES = {each.__name__: "async def" if inspect.iscoroutinefunction(each) else "def" for each in _SIGHTS + _FOOD}


def make_agents(model: Model | OpenAIModel, model_name: str | None) -> tuple[BaseAgent, BaseAgent, BaseAgent]:
    """Make the planner and its two specialists."""
    guide = BaseAgent(
        "Guide",
        "You are a guide to Rome. Call all the tools you need at once: opening hours of each sight, the walk between"
        " them, the queue at the first. If a tool fails, do without it and say so. Answer in three short lines.",
        model_name,
        model,
    )
    gourmet = BaseAgent(
        "Gourmet",
        "You know where to eat in Rome. Look for free tables and read the menus of Da Enzo and Tonnarello, all at once."
        " Answer in two short lines.",
        model_name,
        model,
    )
    for function in _SIGHTS:
        guide.add_tool(function)
    for function in _FOOD:
        gourmet.add_tool(function)
    planner = BaseAgent(
        "Planner",
        "You plan days out. Ask the Guide about sights and the Gourmet about food, both in one turn. Then write a short"
        " plan, one line for each part of the day, and say what you could not find out.",
        model_name,
        model,
    )
    return planner.register_delegate(guide).register_delegate(gourmet), guide, gourmet


def play(request: RecordedRequest) -> answers.Answer:
    """Answer as the models of the three agents would: ask for tools first, then write what they told."""
    offered = {each["function"]["name"] for each in request.body.get("tools", ())}
    results = _results(request.body["messages"])
    if "queue_camera" in offered:
        delay, answer = 0.3, _guide(results)
    elif "free_tables" in offered:
        delay, answer = 0.4, _gourmet(results)
    else:
        delay, answer = 0.35, _planner(results)
    # Roughly what a tokenizer would say of English text.
    usage = (len(request.raw) // 4, len(answer) // 4 if isinstance(answer, str) else 12 * len(answer))
    if isinstance(answer, str):
        return answers.text(answer, delay=delay, usage=usage)
    return answers.calls(*answer, delay=delay, usage=usage)


_Played = str | list[answers.ToolCallAnswer]


def _planner(results: Mapping[str, list[str]]) -> _Played:
    if not results:
        return [
            answers.call("delegate_to_guide", {"query": "Colosseum and Galleria Borghese in one morning"}),
            answers.call("delegate_to_gourmet", {"query": "Dinner for 2 in Trastevere tonight"}),
        ]
    morning = results["delegate_to_guide"][0].replace("\n", "\n         ")
    evening = results["delegate_to_gourmet"][0].replace("\n", "\n         ")
    return f"Morning  {morning}\nEvening  {evening}"


def _guide(results: Mapping[str, list[str]]) -> _Played:
    first, second = "Colosseum", "Galleria Borghese"
    if not results:
        return [
            answers.call("opening_hours", {"sight": first}),
            answers.call("opening_hours", {"sight": second}),
            answers.call("walking_time", {"start": first, "end": second}),
            answers.call("queue_camera", {"sight": first}),
        ]
    hours = [json.loads(text)["open"] for text in results["opening_hours"]]
    queue = results["queue_camera"][0]
    seen = "Its camera is silent: come early." if queue.startswith("Error:") else queue
    return f"{first}, open {hours[0]}. {seen}\nThen {results['walking_time'][0]}.\n{second}, open {hours[1]}."


def _gourmet(results: Mapping[str, list[str]]) -> _Played:
    if not results:
        return [
            answers.call("free_tables", {"area": "Trastevere", "people": 2}),
            answers.call("menu_today", {"restaurant": "Da Enzo"}),
            answers.call("menu_today", {"restaurant": "Tonnarello"}),
        ]
    first, second = json.loads(results["free_tables"][0])
    return f"{first}: {results['menu_today'][0]}.\nOr {second}: {results['menu_today'][1]}."


def _results(messages: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The results of the tools that the last question was about, by name and in call order."""
    messages = messages[max(index for index, message in enumerate(messages) if message["role"] == "user") :]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    names = {call["id"]: call["function"]["name"] for call in calls}
    results: dict[str, list[str]] = {}
    for message in messages:
        if message["role"] == "tool":
            results.setdefault(names[message["tool_call_id"]], []).append(message["content"])
    return results


@contextmanager
def _endpoint(
    base_url: str | None, answer: Callable[[RecordedRequest], answers.Answer] | None = None
) -> Generator[Endpoint | None]:
    """The endpoint inside this process, unless the user has one."""
    if base_url or os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_KEY"):
        yield None
    else:
        with without_proxy(), Endpoint(answer or play) as endpoint:
            yield endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """Tasks and threads that remain after the run.

    Attributes:
        tasks: Tasks of the event loop, counted when the run had returned.
        threads: Threads, counted when the loop had ended.
        connections: Connections, as the endpoint in this process counts them; None for one that is elsewhere.
    """

    tasks: int
    threads: int
    connections: int | None

    @property
    def is_clean(self) -> bool:
        """Whether nothing remains."""
        return not (self.tasks or self.threads or self.connections)

    def __str__(self) -> str:
        counted = {"tasks": self.tasks, "threads": self.threads, "connections": self.connections}
        return ", ".join(f"{name} left: {count}" for name, count in counted.items() if count is not None)


def run_demo(
    console: Console,
    *,
    backend: Backend,
    base_url: str | None,
    model: str | None,
    timeout: float | None,
    trace: str | None = None,
) -> tuple[AgentResult, Leftovers]:
    """Run the demo and show it.

    Args:
        console: Where to.
        backend: Event loop to run on.
        base_url: Endpoint to talk to. None: that of the environment, or one inside this process that plays the models.
        model: Name of the model there.
        timeout: Seconds the planner has, or None.
        trace: File that a page of the run is written to, or None.

    Returns:
        The planner's result, and what was left of its run.
    """
    with _endpoint(base_url) as endpoint:
        tree = RunTree(_NOTES)
        # A server of one's own needs no key: without one, no such header is sent.
        wire = OpenAIModel(base_url=endpoint.url if endpoint else base_url)
        planner, *_ = make_agents(wire, model)
        kit = TracingKit()
        planner.observers = (tree,) if trace is None else (tree, kit)
        models = "played by this process, no key and no network" if endpoint else one_line(planner.model)
        _show_opening(console, planner, models)

        async def main() -> tuple[AgentResult, int]:
            before = len(anyio.get_running_tasks())
            result = await watch(console, tree, lambda: planner.run(QUESTION, timeout=timeout))
            return result, len(anyio.get_running_tasks()) - before

        threads = set(threading.enumerate())
        result, tasks = anyio.run(main, backend=backend)
        left = Leftovers(tasks=tasks, threads=_threads_since(threads), connections=_connections(endpoint))
    _show_closing(console, backend, tree, result, left)
    if trace is not None:
        write_page(kit.get_trace(), trace, "fractal demo")
        console.print(Text(f"to look at in a browser: {Path(trace).expanduser().absolute()}"))
    return result, left


def serve_demo(*, base_url: str | None, model: str | None, timeout: float | None, port: int) -> None:
    """Serve the three agents of the demo, with a chat page, until Ctrl-C.

    Args:
        base_url: As in `run_demo`.
        model: As in `run_demo`.
        timeout: Seconds that each run has, or None.
        port: Where.
    """
    with _endpoint(base_url, _play_slowly) as endpoint:
        wire = OpenAIModel(base_url=endpoint.url if endpoint else base_url)
        agents = make_agents(wire, model)
        say(f"Ask the {agents[0].name}, say: {QUESTION}")
        serve_agents({agent.name: agent for agent in agents}, Address(port=port), timeout=timeout)


def _play_slowly(request: RecordedRequest) -> answers.Answer:
    """Answer word by word, as one reads."""
    return replace(play(request), chunk_delay=0.03)


def _threads_since(before: set[threading.Thread]) -> int:
    """New threads that are still there after a moment."""
    limit = time.monotonic() + _LONGEST_WAIT
    while True:
        new = [thread for thread in set(threading.enumerate()) - before if not _is_idle(thread)]
        if not new or time.monotonic() > limit:
            return len(new)
        time.sleep(0.01)


def _is_idle(thread: threading.Thread) -> bool:
    """Whether a thread is one of the idle workers that are kept for ten seconds."""
    return _KEPT.fullmatch(thread.name) is not None and line_in_thread(thread) is None


_KEPT = re.compile(rf"Trio thread \d+|{THREAD_NAME}")


def _connections(endpoint: Endpoint | None) -> int | None:
    if endpoint is None:
        return None
    with suppress(TimeoutError):
        endpoint.wait_until_closed(_LONGEST_WAIT)
    return endpoint.connections


def _show_opening(console: Console, planner: BaseAgent, models: str) -> None:
    console.print(Text.assemble(("fractal demo", "bold"), f"  models: {models}"))
    console.print(Text.assemble((f"{planner.name}: ", "bold cyan"), QUESTION))
    console.print()


def _show_closing(console: Console, backend: Backend, tree: RunTree, result: AgentResult, left: Leftovers) -> None:
    look, width = look_of(console), min(console.width, WIDEST)
    if result.success:
        answer = Text(printable(text_of(result.content)))
        title = Text(one_line(result.agent_name))  # as text it is no markup
        console.print(Panel(answer, title=title, title_align="left", border_style="cyan", width=width))
        console.print()
    console.print(result_table(tree, look, width))
    console.print()
    console.print(timeline(tree, look, width))
    console.print()
    for warning in result.warnings:
        console.print(Text(f"warning: {printable(warning)}", "yellow"))
    gain = f"{tree.work:.1f} s of work in {result.elapsed:.1f} s"
    console.print(Text.assemble((backend, "bold"), f" {look.dot} ", (gain, "bold")))
    console.print(Text(str(left), "green" if left.is_clean else "bold red"))
