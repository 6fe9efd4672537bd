"""Measures: rounds of scenarios, in each scenario one adapter after the other."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.adapters import ADAPTERS, Spec
from benchmarks.endpoint import Endpoint, running
from benchmarks.scenarios import Scenario

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = Path(__file__).parent / ".venvs"
Result = dict[str, Any]


def python_of(spec: Spec) -> Path:
    """The interpreter that has the adapter's library."""
    return ENVIRONMENTS / spec.module / "bin" / "python" if spec.is_peer else Path(sys.executable)


def is_installed(name: str) -> bool:
    """Whether an adapter can be measured here."""
    spec = ADAPTERS[name]
    return python_of(spec).exists() and (spec.is_peer or all(importlib.util.find_spec(each) for each in spec.needs))


def environment() -> dict[str, str]:
    """That of the measured processes: nothing of the user's that would change what they do."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    quiet = {
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        # Nobody is to be told of the runs.
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LANGSMITH_TRACING": "false",
        "AGNO_TELEMETRY": "false",
        "OTEL_SDK_DISABLED": "true",
    }
    return {**kept, **quiet, "PYTHONPATH": str(ROOT)}


class Child:
    """A process that measures one adapter: see `benchmarks.child`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.command = [str(python_of(ADAPTERS[name])), "-m", "benchmarks.child", name]
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # it ends with the process
        verbose = "BENCHMARKS_VERBOSE" in os.environ
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else self._errors,
        )
        self.facts = self._line()

    def measure(self, job: Result) -> Result:
        """Do a job there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        return self._line()

    def close(self) -> None:
        """End it."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
        self._errors.close()

    def _line(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"the process of {self.name} has ended: {said[-1] if said else 'without a word'}")
        found: Result = json.loads(line)
        return found


@dataclass
class Bench:
    """All that is measured in one go.

    Args:
        scenarios: What.
        names: Who.
        rounds: How often.
    """

    scenarios: Sequence[Scenario]
    names: Sequence[str]
    rounds: int
    children: dict[str, Child] = field(default_factory=dict)
    measured: dict[str, dict[str, list[Result]]] = field(default_factory=dict)

    def run(self) -> Result:
        """Measure; gives what is written as JSON."""
        started = time.perf_counter()
        with running() as endpoint, ExitStack() as opened:
            for name in self.names:
                self.children[name] = Child(name)
                opened.callback(self.children[name].close)
            self._all_rounds(endpoint)
        return {
            "machine": machine(),
            "rounds": self.rounds,
            "seconds": round(time.perf_counter() - started),
            "adapters": {name: self._facts(name) for name in self.names},
            "measured": {
                scenario: {name: together(found) for name, found in by_name.items()}
                for scenario, by_name in self.measured.items()
            },
        }

    def profile(self) -> str:
        """Where the time goes in the one scenario, for the one adapter."""
        [name], [scenario] = self.names, self.scenarios
        with running() as endpoint, closing(Child(name)) as child:
            number = endpoint.play(replace(scenario.play, **child.facts["play"]))
            found = child.measure({**_job(endpoint, number, scenario), "profile": True})
            return str(found.get("profile", found))

    def _facts(self, name: str) -> Result:
        facts = self.children[name].facts
        return {"title": ADAPTERS[name].title, "versions": facts["versions"]}

    def _all_rounds(self, endpoint: Endpoint) -> None:
        steps = list(self._steps())
        progress = Progress(len(steps))
        for number, scenario, name in steps:
            progress.show(f"round {number + 1} of {self.rounds}", scenario.name, name)
            found = self._measure(endpoint, scenario, name)
            if "failed" in found:
                progress.say(f"{scenario.name}, {name}: {found['failed']}")
            self.measured.setdefault(scenario.name, {}).setdefault(name, []).append(found)
        progress.end()

    def _steps(self) -> Iterator[tuple[int, Scenario, str]]:
        for number in range(self.rounds):
            # There and back, so that nobody is always measured right after the same neighbour.
            names = self.names[::-1] if number % 2 else self.names
            for scenario in self.scenarios:
                for name in names:
                    if name in scenario.who and (number == 0 or name not in scenario.once):
                        yield number, scenario, name

    def _measure(self, endpoint: Endpoint, scenario: Scenario, name: str) -> Result:
        child, kind = self.children[name], scenario.kind
        if kind == "import":
            return import_of(ADAPTERS[name], scenario.job.get("statement", child.facts["imports"]))
        why_not = child.facts["cannot"].get("tools" if kind in ("cancel", "waiting", "first") else kind)
        why_not = child.facts["cannot"].get(kind, why_not)
        if why_not is not None:
            return {"cannot": why_not}
        number = endpoint.play(replace(scenario.play, **child.facts["play"]))
        job = _job(endpoint, number, scenario)
        if kind == "first":
            return first_run(child.command, {**job, "kind": "tools", "size": 1, "warm": 0})
        before = endpoint.seen(number)
        found = child.measure(job)
        if "failed" in found:
            return found
        after = endpoint.seen(number)
        if "total" in found:  # near 1 it would be the endpoint that is measured
            found["endpoint"] = (after["cpu"] - before["cpu"]) / found["total"]
        return checked(scenario, found, after)


def _job(endpoint: Endpoint, number: int, scenario: Scenario) -> Result:
    url = endpoint.url(number)
    return {"url": url, "seen": url.removesuffix("/v1"), **scenario.job}


def together(found: list[Result]) -> Result:
    """The results of all rounds as one: a list for each number, or why there is none."""
    for each in found:
        if "failed" in each or "cannot" in each:
            return each
    return {name: [each[name] for each in found] for name in found[0]}


def checked(scenario: Scenario, found: Result, after: Result) -> Result:
    """The result, if the adapter has done the work; or what it did instead."""
    if scenario.requests is not None:
        job = scenario.job
        runs = job.get("at_once", 1) * (job.get("each", 1) + job.get("warm", 1))
        requests, looks = after["served"] / runs, found.pop("looks")
        if (requests, looks) != (scenario.requests, scenario.looks):
            wanted = f"{scenario.requests} and {scenario.looks}"
            return {"failed": f"{requests:g} requests and {looks:g} tool calls in a run, not {wanted}"}
        if after["waiting"]:
            return {"failed": f"{after['waiting']:g} requests are left"}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def import_of(spec: Spec, statement: str) -> Result:
    """What a new process spends on an import, less what an empty one spends."""
    python = str(python_of(spec))
    cpu, wall = _spent([python, "-c", statement])
    empty_cpu, empty_wall = _spent([python, "-c", "pass"])
    return {"cpu": cpu - empty_cpu, "wall": wall - empty_wall}


def first_run(command: list[str], job: Result) -> Result:
    """What a new process spends until its first answer."""
    try:
        cpu, wall = _spent([*command, "--first"], json.dumps(job).encode() + b"\n")
    except RuntimeError as error:
        return {"failed": str(error)}
    return {"cpu": cpu, "wall": wall}


def _spent(command: list[str], told: bytes = b"") -> tuple[float, float]:
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(told)
        given.seek(0)
        wall = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=given, stdout=said, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - wall
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        failure = json.loads(said.read() or b"{}").get("failed")
    if status or failure:
        raise RuntimeError(f"{' '.join(command)}: {failure or f'ended with {process.returncode}'}")
    return usage.ru_utime + usage.ru_stime, wall


def machine() -> Result:
    """Where the numbers come from."""
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1),
    }


class Progress:
    """Tells on the standard error what is going on: on a terminal in one line, else a line for each scenario."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.started = time.perf_counter()
        self.scenario: tuple[str, str] | None = None

    def show(self, round_: str, scenario: str, adapter: str) -> None:
        took = time.perf_counter() - self.started
        left = f", about {took / self.done * (self.steps - self.done):.0f} s left" if self.done > 9 else ""
        self.done += 1
        if sys.stderr.isatty():
            self._write(f"\r\x1b[K{round_}: {scenario}, {adapter} ({self.done} of {self.steps}{left})")
        elif self.scenario != (round_, scenario):
            self.scenario = (round_, scenario)
            self._write(f"{round_}: {scenario} ({self.done} of {self.steps}{left})\n")

    def say(self, text: str) -> None:
        self._write(("\r\x1b[K" if sys.stderr.isatty() else "") + f"  {text}\n")

    def end(self) -> None:
        if sys.stderr.isatty():
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
