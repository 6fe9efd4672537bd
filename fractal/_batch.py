"""`fractal run-many`: a file of inputs in, results as JSON lines out."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import ExitStack, aclosing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TextIO

import anyio
import anyio.to_thread

from fractal._feed import Feed
from fractal._json import decode, encode
from fractal._progress import shown
from fractal._tree import printable
from fractal.agent import AgentDefinition, BaseAgent
from fractal.errors import InvalidArguments
from fractal.many import BatchItem, OnError, Progress, stream_many

__all__ = ["answer_file"]


def answer_file(
    agent: AgentDefinition,
    path: str,
    *,
    output: str | None = None,
    as_json: bool = False,
    max_concurrency: int = 8,
    on_error: OnError = "collect",
    is_quiet: bool = False,
    options: Mapping[str, Any],
    backend: str = "asyncio",
) -> Progress:
    """Answer each line of a file, and write a line of JSON for each answer as it comes.

    Args:
        agent: The agent.
        path: The file, in UTF-8; `-` is standard input. Blank lines are passed over.
        output: File to write to; None is standard output.
        as_json: Whether a line is a JSON value, and not text.
        max_concurrency: Runs at a time.
        on_error: As in `stream_many`.
        is_quiet: Show no progress on standard error.
        options: Of each run.
        backend: Event loop to run on.

    Returns:
        How it ended.

    Raises:
        InvalidArguments: A file cannot be opened, or a line cannot be read.
        RunError: The first run that failed, with `on_error="fail_fast"`.
    """

    async def work() -> Progress:
        # An agent may open something of its own.
        async with agent if isinstance(agent, BaseAgent) else nullcontext():
            inputs = _inputs(path, as_json)
            async with stream_many(
                agent, inputs, max_concurrency=max_concurrency, on_error=on_error, **options
            ) as batch:

                def read() -> Progress:
                    return replace(batch.progress, total=total)

                async def write_all() -> None:
                    async for item in batch:
                        # In a thread: whoever reads our output may be slow, and runs under way have deadlines.
                        await anyio.to_thread.run_sync(write, _line(item))

                await (write_all() if is_quiet else shown(read, write_all))
        return batch.progress

    total = _count_lines(path)
    with _opened_output(output, path) as write:
        return anyio.run(work, backend=backend)


def _line(item: BatchItem) -> str:
    # The messages are in the result itself as well.
    result = item.result.model_dump(mode="json", exclude={"metadata": {"messages"}})
    return encode({"index": item.index, "input": item.input, "result": result}).decode()


async def _inputs(path: str, as_json: bool) -> AsyncGenerator[object]:
    number = 0
    async with aclosing(_lines(path)) as lines:
        async for line in lines:
            number += 1
            if line.strip():
                yield _parsed(line, number) if as_json else line.rstrip("\r\n")


def _parsed(line: str, number: int) -> object:
    try:
        value = decode(line)
    except ValueError as error:
        raise InvalidArguments(f"line {number} is not JSON: {error}") from None
    if value is None:
        raise InvalidArguments(f"line {number} is null: give text, an object or a list")
    return value


async def _lines(path: str) -> AsyncGenerator[str]:
    """The lines, each read when it is asked for, in a thread that may wait for it as long as it likes.

    It is a daemon, and no worker thread: nobody can cancel a read, and the program must not wait for one at its end.
    """
    feed: Feed[str | Exception] = Feed(0)
    inlet = feed.from_afar()
    wanted, is_left = threading.Semaphore(0), threading.Event()

    def read() -> None:
        try:
            with _opened_input(path) as file:
                line = "\n"
                while line and wanted.acquire() and not is_left.is_set():
                    line = file.readline()
                    inlet.put(line)
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


def _opened_input(path: str) -> TextIO:
    # Standard input anew: at its end Python wants the lock of sys.stdin, which a thread that reads from it holds.
    return open(0 if path == "-" else path, encoding="utf-8-sig", closefd=path != "-")


def _count_lines(path: str) -> int | None:
    """How many inputs there are; None if that cannot be said without taking them.

    Raises:
        InvalidArguments: There is no such file.
    """
    with _named(path):
        if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return sum(1 for line in file if line.strip())


@contextmanager
def _opened_output(path: str | None, source: str) -> Generator[Callable[[str], None]]:
    if path is None:
        yield lambda line: _write(sys.stdout, line)  # looked up each time: a bar on a terminal puts itself before it
        return
    with ExitStack() as stack:
        with _named(path):
            if os.path.exists(path) and source != "-" and os.path.samefile(path, source):
                raise InvalidArguments(f"{path} is read: name another file for the results")
            file = stack.enter_context(open(path, "w", encoding="utf-8"))
        yield lambda line: _write(file, line)


def _write(file: TextIO, line: str) -> None:
    try:
        line.encode(file.encoding or "utf-8")  # what a bar puts in the place of a terminal does not know its own
    except UnicodeEncodeError:
        line = json.dumps(decode(line))  # JSON's own escapes
    file.write((printable(line) if file.isatty() else line) + "\n")
    file.flush()


@contextmanager
def _named(path: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArguments(f"{path}: {error.strerror or error}") from None
