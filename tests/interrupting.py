"""Ctrl-C at each bytecode of the facade: a program that traces its main thread, which nothing else may do meanwhile.

`python -m tests.interrupting LOOP SCENARIO` makes a scenario again and again, with a `KeyboardInterrupt` at another
instruction of the facade's code each time, and prints how many there were, and a line for each that ended badly.
"""

from __future__ import annotations

import contextlib
import dis
import faulthandler
import functools
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import anyio

import fractal
from fractal import BaseAgent, Reply, RunCancelled, sync, tool
from fractal.model import ToolCall
from fractal.sync import _portal

WITHIN = 5.0
"""Seconds in which all has ended."""

PACKAGE = os.path.dirname(fractal.__file__)
FACADE = {os.path.join(PACKAGE, "sync", name) for name in os.listdir(os.path.join(PACKAGE, "sync"))}
FACADE.add(os.path.join(PACKAGE, "_concurrency", "crossing.py"))


class Interrupter:
    """Counts the instructions of the facade in this thread, and raises at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self._at = at
        self.count = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._begin)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)

    def _begin(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in FACADE or any("__del__" in place for place in places(frame)):
            return None  # what is raised in a finalizer is told to nobody
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            if frame.f_lasti in left_out(frame.f_code):
                return self._step
            self.count += 1
            if self.count == self._at:
                self.where = f"{frame.f_lasti} of " + ", ".join(places(frame))
                sys.settrace(None)
                Slow.goes_on.set()
                raise KeyboardInterrupt
        return self._step


@functools.cache
def left_out(code: CodeType) -> set[int]:
    """The instructions at which nothing is raised here, or nowhere.

    CPython loses a frame if a trace function raises in the handler of an exception; and no signal is looked for between
    the last call of a function and the next instruction of its caller.
    """
    found, is_in = set[int](), False
    instructions = list(dis.get_instructions(code))
    if code is sync.BaseAgent.__exit__.__code__:
        # Of what was entered nobody but the agent knows: as with any context manager, Ctrl-C in the moment in which
        # `__exit__` is called comes too early.
        first = itertools.takewhile(
            lambda each: each.opname in ("RESUME", "LOAD_CONST", "STORE_FAST", "NOP"), instructions
        )
        found.update(each.offset for each in first)
    for each in instructions:
        is_in = is_in or each.opname == "PUSH_EXC_INFO"
        if is_in:
            found.add(each.offset)
        is_in = is_in and each.opname not in ("POP_EXCEPT", "RERAISE")
    for each, following in itertools.pairwise(instructions):
        if following.opname == "RETURN_VALUE":
            found.update([following.offset, *([each.offset] if each.opname.startswith("LOAD_") else [])])
    return found


def places(frame: FrameType | None) -> Iterator[str]:
    while frame is not None and frame.f_code.co_filename in FACADE:
        yield f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back


class Slow:
    """A model, and whatever else takes time: short, as long as nobody is interrupted, and for ever from then on."""

    goes_on = threading.Event()
    in_flight = 0

    async def respond(self, request: Any) -> Reply:
        await self.work()
        if len(request.transcript) == 1:
            return Reply(tool_calls=(ToolCall("one", "plain", "{}"),), finish_reason="tool_calls")
        return Reply(text="done", finish_reason="stop")

    async def stream(self, request: Any, sink: Any) -> Reply:
        return await self.respond(request)

    @classmethod
    async def work(cls) -> None:
        cls.in_flight += 1
        try:
            await anyio.sleep(0.001)
            while cls.goes_on.is_set():  # noqa: ASYNC110  # an event of threads
                await anyio.sleep(0.005)
        finally:
            cls.in_flight -= 1


@tool
def plain() -> str:
    return "plain"


agent = BaseAgent("A", "a", client=Slow()).add_tool(plain)


@contextlib.asynccontextmanager
async def pool() -> AsyncGenerator[str]:
    Slow.in_flight += 1
    try:
        yield "pool"
    finally:
        Slow.in_flight -= 1


class Shop(sync.BaseAgent):
    async def __aenter__(self) -> Shop:
        Slow.in_flight += 1
        return self

    async def __aexit__(self, *exc: object) -> None:
        Slow.in_flight -= 1


shop = Shop("Shop", "s", client=Slow()).add_tool(plain)


def run() -> None:
    assert sync.run(agent, "go").content == "done"


def run_many() -> None:
    assert len(sync.run_many(agent, ["a", "b"])) == 2


def execute_tool() -> None:
    assert sync.execute_tool(agent, "plain").content == "plain"


def call() -> None:
    sync.call(Slow.work)


def stream() -> None:
    with sync.stream(agent, "go") as events:
        assert next(events).kind == "run_started"
        assert next(events).kind


def stream_to_its_end() -> None:
    with sync.stream(agent, "go") as events:
        assert "".join(events.text()) == ""
    assert events.result().content == "done"


def stream_many() -> None:
    with sync.stream_many(agent, ["a", "b", "c"]) as batch:
        assert next(batch).result.success


def start_and_cancel() -> None:
    handle = sync.start(agent, "go")
    try:
        handle.cancel()
        handle.result(5)
    except RunCancelled:
        pass
    except BaseException:
        handle.cancel()
        raise


def enter() -> None:
    with sync.enter(pool()) as opened:
        assert opened == "pool"
        sync.call(Slow.work)


def enter_agent() -> None:
    with shop as opened:
        assert opened.run("go").content == "done"


def portal() -> None:
    with sync.portal(**OPTIONS):
        sync.call(Slow.work)


def first_call() -> None:
    sync.call(Slow.work)  # on a portal that has not begun: see `main`


SCENARIOS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        run,
        run_many,
        execute_tool,
        call,
        stream,
        stream_to_its_end,
        stream_many,
        start_and_cancel,
        enter,
        enter_agent,
        portal,
        first_call,
    )
}
LOOPS: dict[str, dict[str, Any]] = {"asyncio": {}, "uvloop": {"use_uvloop": True}, "trio": {"backend": "trio"}}
OPTIONS: dict[str, Any] = {}


def portals() -> int:
    # Python lists a thread for good whose start was interrupted.
    return sum(thread.name.startswith("fractal portal") and thread.is_alive() for thread in threading.enumerate())


def came_to(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + WITHIN
    while not condition() and time.monotonic() < until:
        time.sleep(0.0005)
    return condition()


def interrupted_at(point: int, scenario: Callable[[], None], expected_portals: int) -> tuple[bool, str | None]:
    """Whether there is such a point, and what was wrong."""
    Slow.goes_on.clear()
    before = Slow.in_flight  # something, if it was not well before
    faulthandler.dump_traceback_later(20, exit=True)
    fault = None
    with Interrupter(point) as interrupter:
        started = time.monotonic()
        try:
            scenario()
            if interrupter.where:
                fault = "the interrupt was swallowed"
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            fault = f"{error!r} was raised"
    seconds = time.monotonic() - started
    gc.collect()  # an exception that interrupts the handling of another one is part of a cycle
    if not interrupter.where:
        return False, fault
    if seconds > WITHIN:
        fault = fault or f"it took {seconds:.1f} s"
    if not came_to(lambda: Slow.in_flight <= before):
        fault = fault or "it goes on"
    Slow.goes_on.clear()
    came_to(lambda: Slow.in_flight <= before)
    began = time.monotonic()
    if sync.call(anyio.sleep, 0) is not None or time.monotonic() - began > WITHIN:
        fault = fault or "the next call does not work"
    if not came_to(lambda: portals() <= expected_portals):
        fault = fault or f"{portals()} event loops are there"
    return True, fault and f"{interrupter.where}: {fault}"


def main(loop: str, name: str) -> None:
    OPTIONS.update(LOOPS[loop])
    gc.disable()  # what it collects, and where, is another matter
    scenario = SCENARIOS[name]
    begins = name == "first_call"
    with sync.portal(**OPTIONS) if not begins else contextlib.nullcontext():
        scenario()
        expected, point = portals(), 1
        gc.freeze()
        while True:
            if begins:
                _portal._shared.close()
                _portal._shared = _portal.Portal(**OPTIONS)
            is_there, fault = interrupted_at(point, scenario, expected)
            if fault is not None:
                sys.stdout.write(f"{fault}\n")
            if not is_there:
                break
            point += 1
    faulthandler.cancel_dump_traceback_later()
    if begins:
        _portal._shared.close()
    sys.stdout.write(f"{point - 1}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
