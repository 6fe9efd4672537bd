"""`fractal run-many`: a file of inputs in, results as JSON lines out."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TextIO

import anyio
import anyio.to_thread

from fractal import sync
from fractal._concurrency.feed import Feed
from fractal._json import decode, is_mapping
from fractal._texts import one_line, said_by
from fractal._views.progress import shown
from fractal.agent import BaseAgent
from fractal.cli.door import json_line, say_json
from fractal.cli.files import append_to, check_writable, create
from fractal.definition import AgentDefinition
from fractal.errors import InvalidArguments
from fractal.many import BatchItem, OnError, Progress, stream_many
from fractal.results import AgentResult

__all__ = ["Destination", "Done", "answer_file"]

_LONGEST_LINE = 16 * 2**20
"""Characters of an input."""

_MOST_REASONS = 5
"""Why runs failed, in so many lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """The destination of results. Results that a file has already were paid for, and stay.

    Attributes:
        path: The file; None is standard output.
        is_added: Whether results are added to a file that is there.
        leaves_out: Whether inputs are left out that have an answer there.

    Raises:
        InvalidArguments: There is no file that could be added to.
    """

    path: str | None = None
    is_added: bool = False
    leaves_out: bool = False

    def __post_init__(self) -> None:
        if self.path is None and self.is_added:
            raise InvalidArguments(f"{'--resume' if self.leaves_out else '--append'} is for a file: name it with -o")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The outcome of answering a file of inputs.

    Attributes:
        progress: How many runs there were.
        reasons: Why runs failed, and how many, the most frequent first.
        unreadable: What is wrong with the first line that is no input; None if all are.
    """

    progress: Progress
    reasons: Counter[str]
    unreadable: str | None

    def why(self) -> Iterator[str]:
        """The reasons why runs failed, in words."""
        for reason, count in self.reasons.most_common(_MOST_REASONS):
            yield f"{count} x {reason}"
        others = len(self.reasons) - _MOST_REASONS
        if others > 0:
            yield f"and for {others} other reasons"


def answer_file(
    agent: AgentDefinition,
    path: str,
    *,
    to: Destination,
    as_json: bool = False,
    max_concurrency: int = 8,
    on_error: OnError = "collect",
    is_quiet: bool = False,
    options: Mapping[str, Any],
    backend: str = "asyncio",
) -> Done:
    """Answer each line of a file, and write a line of JSON for each answer as it comes.

    A line that is no input has a line of its own, which says why; the others are answered all the same.

    Args:
        agent: The agent.
        path: The file, in UTF-8; `-` is standard input. Blank lines are passed over.
        to: Where the results go.
        as_json: Whether a line is a JSON value, and not text.
        max_concurrency: Runs at a time.
        on_error: As in `stream_many`; a line that is no input counts as a run that failed.
        is_quiet: Show no progress on standard error.
        options: Of each run.
        backend: Event loop to run on.

    Returns:
        How it ended.

    Raises:
        InvalidArguments: A file cannot be opened, or holds something else; with `fail_fast` also a line.
        RunError: The first run that failed, with `on_error="fail_fast"`.
    """
    inputs = _Inputs(path, as_json)
    total = inputs.count()
    with _opened(to, path) as (write, answered):
        batch = _FileBatch(agent, inputs, answered, write, fails_fast=on_error == "fail_fast")
        left = None if total is None else total - sum((answered & inputs.keys()).values() if answered else ())
        work = partial(batch.work, left, is_quiet, max_concurrency=max_concurrency, on_error=on_error, **options)
        return anyio.run(work, backend=backend)


class _Fault(ValueError):
    """A line that is not an input; the text says why."""


class _Inputs:
    """The inputs in a file."""

    def __init__(self, path: str, as_json: bool) -> None:
        self.path, self._as_json = path, as_json

    def count(self) -> int | None:
        """The number of inputs; None if that is unknown without reading them.

        Raises:
            InvalidArguments: There is no such file.
        """
        with _named(self.path):
            if self.path == "-" or not stat.S_ISREG(os.stat(self.path).st_mode):
                return None
            with self._file() as file:
                return sum(1 for line in _lines_of(file) if line.strip())

    def keys(self) -> Counter[str]:
        """The number of times that each input occurs."""
        found: Counter[str] = Counter()
        if self.path != "-" and stat.S_ISREG(os.stat(self.path).st_mode):
            with self._file() as file:
                for number, line in enumerate(_lines_of(file), 1):
                    if line.strip():
                        try:
                            found[_key(self.parsed(line, number))] += 1
                        except _Fault:
                            continue
        return found

    async def lines(self) -> AsyncGenerator[tuple[int, int, str]]:
        """The lines that are not blank: index among them, number in the file, text."""
        index = number = 0
        async with aclosing(_read_in_thread(self.path, self._file)) as lines:
            async for line in lines:
                number += 1
                if line.strip():
                    yield index, number, line
                    index += 1

    def parsed(self, line: str, number: int) -> object:
        """The input in a line.

        Raises:
            _Fault: It is none.
        """
        if len(line) > _LONGEST_LINE:
            raise _Fault(f"line {number} has more than {_LONGEST_LINE} characters")
        try:
            line.encode()
        except UnicodeEncodeError:  # what is no UTF-8 was read as lone surrogates
            raise _Fault(f"line {number} of {self.path} cannot be read: {_decoding_fault(line)}") from None
        if not self._as_json:
            return line.rstrip("\r\n")
        try:
            value = decode(line)
        except ValueError as error:
            raise _Fault(f"line {number} is not JSON: {error}") from None
        if value is None:
            raise _Fault(f"line {number} is null: give text, an object or a list")
        return value

    def _file(self) -> TextIO:
        # Standard input anew: at its end Python wants the lock of sys.stdin, which a thread that reads from it holds.
        is_standard = self.path == "-"
        return open(
            0 if is_standard else self.path, encoding="utf-8-sig", errors="surrogateescape", closefd=not is_standard
        )


def _decoding_fault(line: str) -> str:
    try:
        return line.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return str(error)


def _lines_of(file: TextIO) -> Iterator[str]:
    """The lines of a file; a line that is too long is cut just beyond the limit."""
    while line := file.readline(_LONGEST_LINE + 1):
        rest = line
        while len(rest) > _LONGEST_LINE and not rest.endswith("\n"):
            rest = file.readline(_LONGEST_LINE + 1)
        yield line


class _FileBatch:
    """The inputs of a file on their way to results.

    Args:
        agent: Who answers.
        inputs: What is asked.
        answered: Inputs that have an answer already, and how many.
        write: Writes one line.
        fails_fast: Whether a line that is no input ends it.
    """

    def __init__(
        self,
        agent: AgentDefinition,
        inputs: _Inputs,
        answered: Counter[str],
        write: Callable[[str], None],
        *,
        fails_fast: bool,
    ) -> None:
        self._agent, self._inputs, self._answered, self._write = agent, inputs, answered.copy(), write
        self._fails_fast = fails_fast
        self._positions: dict[int, int] = {}  # in the file, of inputs under way
        self._reasons: Counter[str] = Counter()
        self._unreadable: str | None = None

    async def work(self, total: int | None, is_quiet: bool, **options: Any) -> Done:
        """Answer all inputs."""
        # An agent may open something of its own.
        async with (
            self._agent if isinstance(self._agent, (BaseAgent, sync.BaseAgent)) else nullcontext(),
            stream_many(self._agent, self._given(), **options) as batch,
        ):

            async def write_all() -> None:
                async for item in batch:
                    await self._put(_line(self._positions.pop(item.index), item))
                    self._note(item.result)

            def read() -> Progress:
                return replace(batch.progress, total=total)

            await (write_all() if is_quiet else shown(read, write_all))
        return Done(progress=batch.progress, reasons=self._reasons, unreadable=self._unreadable)

    async def _given(self) -> AsyncGenerator[object]:
        given = 0
        async with aclosing(self._inputs.lines()) as lines:
            async for index, number, line in lines:
                try:
                    value = self._inputs.parsed(line, number)
                except _Fault as fault:
                    await self._refuse(index, line, str(fault))
                    continue
                if self._answered and self._is_answered(value):
                    continue
                self._positions[given] = index
                given += 1
                yield value

    def _is_answered(self, value: object) -> bool:
        key = _key(value)
        self._answered[key] -= 1
        return self._answered[key] >= 0

    async def _refuse(self, index: int, line: str, fault: str) -> None:
        if self._fails_fast:
            raise InvalidArguments(fault)
        self._unreadable = self._unreadable or fault
        result = AgentResult(
            content=fault, agent_name=self._agent.name, success=False, stop_reason="error", error=fault
        )
        await self._put(json_line({"index": index, "input": line[:1000].rstrip("\r\n"), "result": result}))

    def _note(self, result: AgentResult) -> None:
        if not result.success:
            self._reasons[f"{result.stop_reason}: {one_line(result.error or '')}"] += 1

    async def _put(self, line: str) -> None:
        # In a thread: whoever reads our output may be slow, and runs under way have deadlines.
        await anyio.to_thread.run_sync(self._write, line)


def _line(index: int, item: BatchItem) -> str:
    try:
        # The messages are in the result itself as well.
        result = item.result.model_dump(mode="json", exclude={"metadata": {"messages"}})
        return json_line({"index": index, "input": item.input, "result": result})
    except Exception as error:  # one that cannot be written must not take the others with it
        fault = f"the result cannot be written: {said_by(error)}"
        facts = {"agent_name": item.result.agent_name, "success": False, "stop_reason": "error", "error": fault}
        return json.dumps({"index": index, "input": item.input, "result": facts}, default=str)


def _key(value: object) -> str:
    """The key that identifies an input in a file of results."""
    return json.dumps(decode(json_line(value)), sort_keys=True)


async def _read_in_thread(path: str, open_file: Callable[[], TextIO]) -> AsyncGenerator[str]:
    """The lines, each read on demand in a thread, which may wait for them without limit.

    It is a daemon, and no worker thread: nobody can cancel a read, and the program must not wait for one at its end.
    """
    feed: Feed[str | Exception] = Feed(0)
    inlet = feed.for_other_loop()
    wanted, is_left = threading.Semaphore(0), threading.Event()

    def read() -> None:
        try:
            with open_file() as file:
                for line in _lines_of(file):
                    wanted.acquire()
                    if is_left.is_set():
                        return
                    inlet.put(line)
            wanted.acquire()
            inlet.put("")
        except Exception as error:
            inlet.put(error)

    threading.Thread(target=read, name="fractal input", daemon=True).start()
    try:
        while True:
            wanted.release()
            line = await feed.next()
            if isinstance(line, Exception):
                raise InvalidArguments(f"{path} cannot be read: {line}") from line
            if not line:  # the end; an empty line has its line end
                return
            yield line
    finally:
        is_left.set()
        wanted.release()


# ---- where results go


@contextmanager
def _opened(to: Destination, source: str) -> Generator[tuple[Callable[[str], None], Counter[str]]]:
    """A function that writes a line, and the inputs that are answered already."""
    if to.path is None:
        yield _one_at_a_time(say_json), Counter()
        return
    path = os.path.expanduser(to.path)
    with _named(path):
        is_there = os.path.lexists(path)
        if is_there and source != "-" and os.path.exists(path) and os.path.samefile(path, source):
            raise InvalidArguments(f"{path} is the file of inputs: name another file for the results")
        if is_there and not to.is_added:
            raise InvalidArguments(
                f"{path} is there already: --append adds to it, --resume leaves out what it has answers for;"
                " or name another file"
            )
        if is_there:
            check_writable(path)
        answered = _answered_in(path) if is_there and to.leaves_out else Counter[str]()
        file = append_to(path) if to.is_added else create(path)
    with file:

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        yield _one_at_a_time(write), answered


def _one_at_a_time(write: Callable[[str], None]) -> Callable[[str], None]:
    lock = threading.Lock()

    def write_alone(line: str) -> None:
        with lock:
            write(line)

    return write_alone


def _answered_in(path: str) -> Counter[str]:
    """The inputs that have an answer in a file of results.

    Raises:
        InvalidArguments: It is no such file.
    """
    found: Counter[str] = Counter()
    is_empty, has_results = True, False
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in _lines_of(file):
            record = _record(line)  # none where writing the line was interrupted
            is_empty, has_results = is_empty and not line.strip(), has_results or record is not None
            if record is not None and record["result"].get("success", True):
                found[_key(record["input"])] += 1
    if not is_empty and not has_results:
        raise InvalidArguments(f"{path} holds no results of run-many: name another file")
    return found


def _record(line: str) -> Mapping[str, Any] | None:
    try:
        record = decode(line)
    except ValueError:
        return None
    is_one = is_mapping(record) and "input" in record and is_mapping(record.get("result"))
    return record if is_one else None


@contextmanager
def _named(path: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArguments(f"{path}: {error.strerror or error}") from None
