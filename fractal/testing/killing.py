"""A proof that durable runs survive: the process is ended at each write to the journal, and started again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fractal._texts import one_line
from fractal.testing._history import check_messages

__all__ = ["KillFaults", "KillReport", "kill_everywhere"]

LONGEST = 60.0
"""Seconds that one process of a scenario may take."""

When = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class KillReport:
    """What `kill_everywhere` has done.

    Attributes:
        writes: Writes to the journal of the undisturbed scenario.
        points: Moments at which its process was killed.
        faults: What was wrong after that, in words.
    """

    writes: int
    points: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"killed at {self.points} points, {len(self.faults)} faults"


class KillFaults(AssertionError):
    """A scenario does not survive the end of its process.

    Attributes:
        report: What was done, and what was wrong.
    """

    def __init__(self, report: KillReport) -> None:
        self.report = report
        shown = "".join(f"\n- {fault}" for fault in report.faults[:20])
        super().__init__(f"{report}:{shown}")


def kill_everywhere(
    scenario: Callable[..., Any],
    *,
    backend: str = "asyncio",
    points: int | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> KillReport:
    """Run a scenario in a process that is killed at a write to its journal, and again to its end, for every write.

    The process gets SIGKILL before the write is committed, and another one after it. The scenario that is run again has
    to end with the result of an undisturbed one, its tokens and tool calls too, and a transcript that endpoints accept.
    Of each step that the journal has as finished, what it does outside was done once; of a step that was in flight at
    most once more, and of no step without a word in the journal before.

    Args:
        scenario: A function of a module, async or plain, of a `KillWorld`: it begins durable runs with `world.journal`,
            with a model of `world.model(…)`, and with tools that call `world.effect(…)` for what they do outside. It
            returns the last result. It is called anew in each process, and must not depend on what others have in
            memory.
        backend: The event loop of an async scenario: `"asyncio"` or `"trio"`.
        points: How many points to try, evenly chosen. None: all.
        directory: Where to keep the files. None: where temporary files are.

    Returns:
        The numbers.

    Raises:
        KillFaults: The scenario does not survive.
        ValueError: The scenario is no function that another process can import.

    Example:
        ```python
        async def scenario(world):
            @tool(idempotent=True)
            async def pay(order: int) -> str:
                world.effect(f"pay {order}")
                return "paid"

            model = world.model([answers.call("pay", {"order": 17}), "done"])
            agent = BaseAgent("Clerk", "You pay.", client=model).add_tool(pay)
            return await agent.run("Pay order 17", journal=world.journal, run_id="order-17")


        def test_paying_survives():
            print(kill_everywhere(scenario))
        ```
    """
    with tempfile.TemporaryDirectory(dir=directory) as root, _Server(scenario, backend) as server:
        whole = _Trial(Path(root, "whole"), server)
        whole.run_to_end()
        writes = len(whole.writes("begun"))
        all_points: list[tuple[int, When]] = [(k, when) for k in range(1, writes + 1) for when in ("before", "after")]
        chosen = _some(all_points, points)
        faults = list(_static_faults(whole))
        for k, when in chosen:
            trial = _Trial(Path(root, f"{k}-{when}"), server)
            found = trial.faults(k, when, whole)
            faults += [f"killed {when} write {k} ({trial.last_write()}): {each}" for each in found]
    report = KillReport(writes, len(chosen), tuple(faults))
    if faults:
        raise KillFaults(report)
    return report


def _some(points: Sequence[tuple[int, When]], most: int | None) -> Sequence[tuple[int, When]]:
    if most is None or most >= len(points):
        return points
    return [points[round(n * (len(points) - 1) / max(most - 1, 1))] for n in range(most)]


def _static_faults(whole: _Trial) -> Iterator[str]:
    if whole.error is not None:
        yield f"undisturbed, it failed: {whole.error}"
    elif not whole.writes("begun"):
        yield "it writes nothing to world.journal"


class _Trial:
    """One scenario in a directory of its own, with what its processes have left there.

    Args:
        directory: Where its files are.
        server: Starts its processes.
    """

    def __init__(self, directory: Path, server: _Server) -> None:
        directory.mkdir()
        self._directory, self._server = directory, server
        self.error: str | None = None
        self.result: Any = None

    def run_to_end(self, process: int = 0) -> None:
        """Run it in a process that is not killed."""
        status = self._server.run(self._directory, process, 0, "after")
        file = self._directory / "result.json"
        if not file.exists():
            self.error = f"its process ended with status {status}, and without a result"
            return
        ended: dict[str, Any] = json.loads(file.read_text("utf-8"))
        self.error, self.result = ended.get("error"), ended.get("result")

    def writes(self, kind: str, process: int = 0) -> list[str]:
        """The keys of the writes that a process has `begun`, or `done`."""
        return [each["key"] for each in self._lines(f"writes-{kind}-{process}")]

    def last_write(self) -> str:
        """The key of the write at which the process was killed."""
        return (self.writes("begun") or ["none"])[-1]

    def effects(self, process: int) -> Counter[tuple[str, str]]:
        """How often a process has had each effect, by step and name."""
        return Counter((each["step"], each["name"]) for each in self._lines(f"effects-{process}"))

    def faults(self, k: int, when: When, whole: _Trial) -> Iterator[str]:
        """What is wrong after the process was killed at a write, and another one went on."""
        status = self._server.run(self._directory, 0, k, when)
        if status != -signal.SIGKILL:
            yield f"its process did not come to that write, and ended with status {status}"
            return
        records = self._records()
        lost = {*self.writes("done")} - records
        if lost:
            yield f"these writes were done, and are lost: {sorted(lost)}"
        self.run_to_end(1)
        if self.error is not None:
            yield f"it did not end when it was run again: {self.error}"
            return
        yield from self._faults_of_result(whole)
        yield from self._faults_of_effects(whole, records)

    def _faults_of_result(self, whole: _Trial) -> Iterator[str]:
        for name, value in whole.result.items():
            if self.result[name] != value:
                now, before = (one_line(json.dumps(each), 500) for each in (self.result[name], value))
                yield f"the result has other {name}: {now}; undisturbed it has {before}"
        try:
            check_messages(self.result["messages"])
        except Exception as error:
            yield f"the transcript is none that endpoints accept: {error}"

    def _faults_of_effects(self, whole: _Trial, records: set[str]) -> Iterator[str]:
        first, second, expected = self.effects(0), self.effects(1), whole.effects(0)
        for one in {*first, *second, *expected}:
            step, name = one
            is_done = bool(_ends_of(step, name) & records)
            # `time 1 started`, `try 1 sent`; nothing says before that a function of the run's own is called.
            is_begun = any(key.startswith(f"{step} t") for key in records) or _is_own(step, name)
            counts = f"{name!r} of step {step!r} was done {first[one]} times before, {second[one]} after"
            if is_done and (first[one], second[one]) != (expected[one], 0):
                yield f"{counts}, and it was finished"
            elif not is_done and not is_begun and (first[one], second[one]) != (0, expected[one]):
                yield f"{counts}, and it had not begun"
            elif max(first[one], second[one]) > expected[one]:
                yield f"{counts}; undisturbed {expected[one]} times"

    def _records(self) -> set[str]:
        file = self._directory / "journal.db"
        if not file.exists():
            return set()
        connection = sqlite3.connect(file)
        try:
            return {f"{run}: {key}" for run, key in connection.execute("SELECT run_id, key FROM fractal_steps")}
        finally:
            connection.close()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self._directory / name
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def _is_own(step: str, name: str) -> bool:
    """Whether an effect is that of a function of the run's own, such as `compact`, beside a reply."""
    return "." not in step.rpartition("/")[2].rpartition(": ")[2] and name != "reply"


def _ends_of(step: str, name: str) -> set[str]:
    """The records that say that a step has ended."""
    return {f"{step} try 1 window"} if _is_own(step, name) else {f"{step} finished", f"{step} reply"}


class _Server:
    """A process that imports the scenario once, and forks a child for each of its processes."""

    def __init__(self, scenario: Callable[..., Any], backend: str) -> None:
        name = f"{scenario.__module__}:{scenario.__qualname__}"
        if "<locals>" in name or "<lambda>" in name:
            raise ValueError(f"the scenario {name} cannot be imported: give a function of a module")
        file = getattr(sys.modules.get(scenario.__module__), "__file__", None) or ""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fractal.testing._kill_server", name, file, backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, directory: Path, process: int, kill: int, when: When) -> int:
        """Run the scenario in a child; returns how that ended, a signal as a negative number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"directory": str(directory), "process": process, "kill": kill, "when": when, "longest": LONGEST}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ValueError(f"the scenario could not be imported: its process ended with {self._process.wait()}")
        return int(answer)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:  # closes its pipes, at which it ends, and waits for it
            pass
