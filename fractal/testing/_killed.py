"""The process that `kill_everywhere` starts: it imports a scenario, and forks a child each time it is to be run."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from fractal._engine.journaled import step_here
from fractal._json import is_list, is_mapping
from fractal.durable import SQLiteJournal
from fractal.journal import OpenJournal, StepKey
from fractal.model import ModelRequest, Reply
from fractal.results import AgentResult
from fractal.testing._requests import ScriptedRequest
from fractal.testing.answers import AnswerLike
from fractal.testing.scripted import ScriptedModel

__all__ = ["KillWorld"]


class KillWorld:
    """The world of a scenario of `kill_everywhere`: its journal, and what it does outside.

    Args:
        order: Where its files are, which of its processes this is, and when that is to be killed.

    Attributes:
        journal: The journal that its runs are given.
        directory: A directory that all its processes share.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.directory = Path(order["directory"])
        self._process: int = order["process"]
        self.journal = _KillingJournal(self, order["kill"], order["when"])

    def effect(self, name: str) -> None:
        """Note that something was done outside, which must not be done twice.

        Args:
            name: What it was.
        """
        self.note("effects", step=step_here() or ": ", name=name)

    def model(
        self, script: Sequence[AnswerLike | BaseException] | Callable[[ScriptedRequest], AnswerLike | BaseException]
    ) -> ScriptedModel:
        """A model whose replies are effects.

        Args:
            script: The answers of a conversation, in order, as `ScriptedModel` takes them: which is next follows from
                the number of replies that the conversation has. Or a function from the request to the answer.
        """
        return _CountedModel(self, script if callable(script) else _by_turn(script))

    def note(self, file: str, **facts: str) -> None:
        """Add a line to a file that outlives the process."""
        line = json.dumps(facts).encode() + b"\n"
        path = self.directory / f"{file}-{self._process}"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def _by_turn(
    script: Sequence[AnswerLike | BaseException],
) -> Callable[[ScriptedRequest], AnswerLike | BaseException]:
    return lambda request: script[sum(message["role"] == "assistant" for message in request["messages"])]


class _CountedModel(ScriptedModel):
    def __init__(self, world: KillWorld, script: Callable[[ScriptedRequest], AnswerLike | BaseException]) -> None:
        super().__init__(script)
        self._world = world

    async def respond(self, request: ModelRequest) -> Reply:
        self._world.effect("reply")
        return await super().respond(request)


class _KillingJournal:
    """A journal that ends its process at a write.

    Args:
        world: Notes what is written.
        kill: The number of the write; 0: none.
        when: `"before"` or `"after"` it is committed.
    """

    def __init__(self, world: KillWorld, kill: int, when: str) -> None:
        self._world, self._kill, self._when = world, kill, when
        self._journal = SQLiteJournal(world.directory / "journal.db")
        self._writes = 0

    @asynccontextmanager
    async def open(self, run_id: str) -> AsyncGenerator[OpenJournal]:
        """Open the journal of a run."""
        async with self._journal.open(run_id) as opened:
            yield _KillingOpen(opened, partial(self.write, run_id))

    async def write(self, run_id: str, write: Callable[[StepKey, str], Any], key: StepKey, text: str) -> None:
        """Write, and end the process if this is the one."""
        self._writes += 1
        is_last = self._writes == self._kill
        name = f"{run_id}: {key}"
        self._world.note("writes-begun", key=name)
        if is_last and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await write(key, text)
        self._world.note("writes-done", key=name)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)


class _KillingOpen:
    def __init__(self, opened: OpenJournal, write: Callable[..., Awaitable[None]]) -> None:
        self._opened, self._write = opened, write

    def recall(self, key: StepKey) -> str | None:
        return self._opened.recall(key)

    async def record(self, key: StepKey, text: str) -> None:
        await self._write(self._opened.record, key, text)

    async def mark(self, key: StepKey, text: str) -> None:
        await self._write(self._opened.mark, key, text)


# ---- the process


def _scenario(name: str, file: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    if module_name == "__main__":
        spec = importlib.util.spec_from_file_location("__fractal_scenario__", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _shown(result: object) -> dict[str, Any]:
    """What of a result has to be the same, whatever was killed."""
    if not isinstance(result, AgentResult):
        raise TypeError(f"the scenario returned {type(result).__name__}: return the last run's AgentResult")
    shown = result.model_dump(mode="json", include={"content", "stop_reason", "success", "error", "messages", "run_id"})
    ids = dict[str, str]()
    shown["outcomes"] = [[each.tool_name, each.outcome, each.error] for each in result.tool_results]
    return {name: _with_plain_ids(each, ids) for name, each in shown.items()}


def _with_plain_ids(value: Any, ids: dict[str, str]) -> Any:
    """A result with the ids of its calls by their order: models make them anew."""
    if is_list(value):
        return [_with_plain_ids(each, ids) for each in value]
    if not is_mapping(value):
        return value
    plain: dict[str, Any] = {}
    for name, each in value.items():
        if (name == "tool_call_id" or (name == "id" and "function" in value)) and isinstance(each, str):
            plain[name] = ids.setdefault(each, f"call {len(ids) + 1}")
        else:
            plain[name] = _with_plain_ids(each, ids)
    return plain


def _play(scenario: Callable[..., Any], backend: str, order: dict[str, Any]) -> None:
    signal.alarm(int(order["longest"]))  # what hangs ends, too
    world = KillWorld(order)
    try:
        is_async = inspect.iscoroutinefunction(scenario)
        result = anyio.run(scenario, world, backend=backend) if is_async else scenario(world)
        ended: dict[str, Any] = {"result": _shown(result)}
    except Exception:
        ended = {"error": "".join(traceback.format_exc()[-2000:])}
    ended["modules"] = sorted(sys.modules)
    written = world.directory / "result.new"
    written.write_text(json.dumps(ended), "utf-8")
    written.replace(world.directory / "result.json")


def _serve(name: str, file: str, backend: str) -> None:
    scenario = _scenario(name, file)
    importlib.import_module("trio" if backend == "trio" else "asyncio")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            try:
                os.dup2(2, 1)  # what the scenario prints is no answer
                _play(scenario, backend, order)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        _load_as(Path(order["directory"]) / "result.json")
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _load_as(ended: Path) -> None:
    """Load what the first child has loaded, so that the others need not."""
    if _has_loaded or not ended.exists():
        return
    _has_loaded.append(True)
    for name in json.loads(ended.read_text("utf-8"))["modules"]:
        with suppress(Exception):
            importlib.import_module(name)


_has_loaded: list[bool] = []


if __name__ == "__main__":
    _serve(*sys.argv[1:])
