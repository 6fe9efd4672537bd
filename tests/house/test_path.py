"""How far it is from `agent.run` to the wire and back: calls, files, and moves from one file to another.

The bounds are what was counted, and a little more, as functions differ between versions of Python. They only go down.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest

import fractal
from fractal import BaseAgent
from fractal.models._http.connecting import Link
from fractal.testing import Endpoint, answers
from tests.support import calls_then

PACKAGE = Path(fractal.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


async def look(place: str) -> str:
    """Look out of the window."""
    return f"rain in {place}"


def file_of(frame: FrameType) -> str | None:
    """The file of a frame in the package; None outside of it, and in its tools for tests."""
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else "testing/"
    return None if name.startswith("testing/") else name


async def files_of_calls(agent: BaseAgent[Any]) -> list[str]:
    """The file of each call of a function of the package in one run, when all that is made once has been made."""
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and (name := file_of(frame)) is not None:
            called.append(name)

    for _ in range(3):
        await agent.run("go")
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        await agent.run("go")
    finally:
        sys.setprofile(before)
    return called


@pytest.mark.parametrize(
    ("tools", "calls", "files", "moves"),
    [(0, 240, 44, 148), (1, 510, 53, 310)],  # 229, 43 and 141; 489, 52 and 297
    ids=["a text", "one tool"],
)
def test_a_run_takes_a_short_way(
    tools: int, calls: int, files: int, moves: int, endpoint: Callable[..., Endpoint]
) -> None:
    endpoint(calls_then("done", answers.call("look", {"place": "Rome"})) if tools else "done")
    agent = BaseAgent("A", "a", toolkit=[look][:tools])
    called = anyio.run(files_of_calls, agent)
    found = (len(called), len(set(called)), sum(one != other for one, other in pairwise(called)))
    assert all(one <= most for one, most in zip(found, (calls, files, moves), strict=True)), found


def test_the_page_names_the_files_that_a_request_goes_through(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint("done")
    send, stacks = Link.send_at_once, list[list[str]]()

    def send_and_look(link: Link, data: bytes) -> bytes:
        frame: FrameType | None = sys._getframe(1)
        names = list[str]()
        while frame is not None:
            names += [name] if (name := file_of(frame)) is not None else []
            frame = frame.f_back
        stacks.append(names)
        return send(link, data)

    monkeypatch.setattr(Link, "send_at_once", send_and_look)
    anyio.run(BaseAgent("A", "a").run, "go")
    [stack] = stacks
    section = PAGE.read_text("utf-8").partition("## One input, to the wire and back")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", section)
    assert [name for name in stack if not name.startswith(tuple(named))] == []
    rows = re.findall(r"^\| `([\w/.]+)` \|", section, re.MULTILINE)
    assert len(rows) <= 6
    on_the_way = [row for row in rows if any(name.startswith(row) for name in stack)]
    assert on_the_way == rows[2:]  # the first two have begun the task that does all this, and wait for it
