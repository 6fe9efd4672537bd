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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from fractal._json import is_list, is_mapping
from fractal.results import AgentResult
from fractal.testing._killed import KillWorld

__all__: list[str] = []


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
    """The part of a result that has to be the same, whatever was killed."""
    if not isinstance(result, AgentResult):
        raise TypeError(f"the scenario returned {type(result).__name__}: return the last run's AgentResult")
    shown = result.model_dump(mode="json", include={"content", "stop_reason", "success", "error", "messages", "run_id"})
    ids = dict[str, str]()
    shown["outcomes"] = [[each.tool_name, each.outcome, each.error] for each in result.tool_results]
    # Requests may be more, which were in flight.
    shown["usage"] = {"tool_calls": result.usage.tool_calls, "tokens": result.usage.total_tokens}
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
    ended["modules"] = [*sys.modules]  # in the order of loading
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
