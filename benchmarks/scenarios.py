"""What is measured, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.adapters import ADAPTERS, BASE
from benchmarks.endpoint import Play

ALL = tuple(ADAPTERS)
OURS = tuple(name for name, spec in ADAPTERS.items() if not spec.is_peer)
PEERS = tuple(name for name in ALL if name not in OURS)
AWAITED = tuple(name for name in OURS if name != "fractal-sync")
SELDOM = (BASE, "by-hand-aiohttp", "fractal-openai", "fractal-uvloop")
"""Measured in one round only, where a round takes long."""
GOING_ON = ("fractal", "fractal-openai", "fractal-trio", "fractal-sync")
GROWING = (BASE, "by-hand-httpx2", "by-hand-aiohttp", "fractal", "fractal-openai", "fractal-trio")


HANG = Play(turns=0, ends=False)
"""The endpoint takes a request and says nothing."""


@dataclass(frozen=True)
class Scenario:
    """One measurement, and who takes part.

    Args:
        name: How it is called on the command line and in the results.
        title: What it is, in a line.
        job: Fields of `benchmarks.child.Job`; of kind `import` and `first`, none.
        play: What the endpoint does.
        requests: Requests of one run. None: they are not counted.
        looks: Tool calls of one run.
        who: Names of the adapters that take part.
        once: Those of them that take part in one round only, because they take long.
        in_short: Part of the short form.
    """

    name: str
    title: str
    job: dict[str, Any]
    play: Play = field(default_factory=Play)
    requests: int | None = 2
    looks: int = 3
    who: tuple[str, ...] = ALL
    once: tuple[str, ...] = ()
    in_short: bool = True

    @property
    def kind(self) -> str:
        return str(self.job["kind"])

    def tiny(self) -> Scenario:
        """The same with as little work as there can be, to see that it works."""
        job = {**self.job, "at_once": min(self.job.get("at_once", 1), 3), "each": 1, "warm": 0}
        small = replace(self, job=job, play=replace(self.play, latency=self.play.latency / 20), once=())
        turns = self.play.turns
        if turns <= 3:
            return small
        return replace(
            small, job={**job, "size": 3}, play=replace(small.play, turns=3), requests=4, looks=self.looks * 3 // turns
        )


def _runs(at_once: int, each: int, warm: int = 1, **more: Any) -> dict[str, Any]:
    return {"kind": "tools", "at_once": at_once, "each": each, "warm": warm, **more}


def _turns() -> Iterator[Scenario]:
    for turns, each in ((1, 40), (10, 8), (50, 2), (200, 1), (500, 1)):
        yield Scenario(
            f"turns-{turns}",
            f"One run of {turns} turns, one tool call in each",
            _runs(1, each, 1 if turns < 200 else 0, size=turns),
            Play(turns=turns, calls=1),
            requests=turns + 1,
            looks=turns,
            who=ALL if turns <= 50 else GROWING,
            once=PEERS if turns <= 50 else (BASE,),
            in_short=turns == 50,
        )


def _growth() -> Iterator[Scenario]:
    for kind, what in (("request", "A model call"), ("history", "A run that goes on")):
        for size, each in ((2, 200), (200, 100), (800, 50)):
            yield Scenario(
                f"{kind}-{size}",
                f"{what} with {size} messages before",
                {"kind": kind, "size": size, "each": each, "warm": 3},
                Play(turns=0),
                requests=1,
                looks=0,
                who=GROWING if kind == "request" else GOING_ON,  # by hand, both are the same
                once=(BASE,) if size > 2 else (),
                in_short=kind == "request",
            )


def _delegation() -> Iterator[Scenario]:
    for depth in range(1, 6):
        yield Scenario(
            f"delegate-{depth}",
            f"Agents {depth} deep, each asking the next one" if depth > 1 else "One agent that asks nobody",
            {"kind": "delegate", "size": depth, "at_once": 10, "each": 5, "warm": 1},
            Play("delegate"),
            requests=2 * depth - 1,
            looks=0,
            who=ALL if depth == 3 else OURS,
            once=PEERS if depth == 3 else (),
            in_short=False,
        )


def _cancellation() -> Iterator[Scenario]:
    who = (BASE, "by-hand-aiohttp", "fractal", "fractal-openai", "fractal-trio", "fractal-uvloop")
    for name, title, count, more in (
        ("cancel", "1 000 runs cancelled in a model call, each task by itself", 1000, {}),
        ("cancel-scope", "1 000 runs cancelled in a model call, by one scope", 1000, {"by": "scope"}),
        ("cancel-tools", "1 000 runs cancelled, each in 3 tools", 1000, {"tool": "hang"}),
        ("cancel-50", "50 runs cancelled in a model call, each task by itself", 50, {}),
    ):
        yield Scenario(
            name,
            title,
            {"kind": "cancel", "at_once": count, **more},
            Play() if more.get("tool") == "hang" else HANG,
            requests=None,
            who=who if count == 1000 else (*AWAITED, *PEERS),
            once=SELDOM if count == 1000 else PEERS,
            in_short=False,
        )


def _ten_thousand() -> Iterator[Scenario]:
    for name, connections, who in (
        ("ten-thousand", 10_000, (BASE, "by-hand-aiohttp", "fractal-openai", "fractal-trio")),
        ("ten-thousand-default", None, ()),  # AsyncOpenAI would look through its 1000 at each request
    ):
        yield Scenario(
            name,
            "10 000 runs at once, each waiting 1 s on the model; "
            + ("as many connections" if connections else "connections as the library has them"),
            _runs(10_000, 1, 0, connections=connections, limit=300),
            Play(turns=0, latency=1.0),
            requests=1,
            looks=0,
            who=("fractal", *who),
            once=who,
            in_short=False,
        )


def _waiting() -> Iterator[Scenario]:
    """What a run needs in memory while it waits, and what each tool and each delegate adds."""
    yield _wait("waiting", "in a model call", HANG)
    for calls in (1, 3, 10):
        where = f"in {calls} tool call{'s' * (calls > 1)}"
        yield _wait(f"waiting-tools-{calls}", where, Play(calls=calls), calls=calls, tool="hang")
    for depth in (2, 3, 5):
        yield _wait(f"waiting-deep-{depth}", f"{depth} agents deep", Play("delegate", ends=False), size=depth)


def _wait(name: str, where: str, play: Play, **more: Any) -> Scenario:
    who = (BASE, "by-hand-aiohttp", "fractal", "fractal-openai", "fractal-trio")
    job = {"kind": "waiting", "at_once": 500, **more}
    return Scenario(name, f"500 runs that wait, {where}", job, play, None, 0, who, once=who, in_short=False)


def _facade() -> Iterator[Scenario]:
    for threads, each, latency in ((1, 1000, 0.0), (16, 100, 0.0), (16, 20, 0.02)):
        name = f"facade-{threads}" + (f"-{latency * 1000:g}ms" if latency else "")
        yield Scenario(
            name,
            f"The blocking facade, {threads} thread{'s' * (threads > 1)}, a model in memory that takes "
            f"{latency * 1000:g} ms",
            {"kind": "facade", "at_once": threads, "each": each, "latency": latency},
            requests=None,
            looks=0,
            who=("fractal-sync",),
        )


SCENARIOS: dict[str, Scenario] = {
    each.name: each
    for each in (
        Scenario("one", "One run at a time, 3 tools", _runs(1, 60, 10)),
        Scenario("fifty", "50 runs at a time, 3 tools", _runs(50, 6, 2)),
        Scenario("five-hundred", "500 runs at a time, 3 tools, 50 ms of latency", _runs(500, 1), Play(latency=0.05),
                 once=(*PEERS, "by-hand-httpx2", "by-hand-httpx2-trio", "fractal-uvloop", "fractal-sync"),
                 in_short=False),
        *_ten_thousand(),
        Scenario("plain-tools", "50 runs at a time, 3 `def` tools that block for 10 ms", _runs(50, 2, tool="plain"),
                 once=PEERS),
        *_turns(),
        *_growth(),
        Scenario("stream", "A streamed answer of 500 pieces, as fast as they come",
                 {"kind": "stream", "each": 8, "warm": 2}, Play("stream"), 1, 0, once=PEERS),
        Scenario("stream-paced", "A streamed answer of 500 pieces, half a millisecond apart",
                 {"kind": "stream", "each": 4}, Play("stream", pace=0.0005), 1, 0,
                 (BASE, "by-hand-httpx2", "fractal", "fractal-sync"), in_short=False),
        Scenario("object", "An answer as a checked object, 10 runs at a time",
                 {"kind": "object", "at_once": 10, "each": 10, "warm": 2}, Play("object"), 1, 0,
                 once=PEERS),
        *_delegation(),
        *_cancellation(),
        *_waiting(),
        *_facade(),
        Scenario("import", "The import of the agent class", {"kind": "import"}, requests=None, looks=0,
                 once=PEERS),
        *(
            Scenario(f"import-{name}", f"`{statement}` in a new process", {"kind": "import", "statement": statement},
                     requests=None, looks=0, who=("fractal",))
            for name, statement in (("package", "import fractal"), ("parts", "import anyio, pydantic"))
        ),
        Scenario("first", "A new process, until the first answer", {"kind": "first"}, Play(turns=0), None, 0,
                 once=PEERS, in_short=False),
    )
}  # fmt: skip
