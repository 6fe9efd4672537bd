"""What `fractal trace` shows of a fixed file, character by character: narrow and wide, with and without colours.

The file has calls side by side, delegates, a retry, an error, a timeout, a run that was killed, and texts that would
steer a terminal. A picture that is not there yet is written, and the test fails once, for somebody to look at it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fractal.cli.main import main

pytest.importorskip("rich")

TRACES = Path(__file__).with_name("traces")


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place whose clocks are known."""
    if not hasattr(time, "tzset"):
        pytest.skip("the clock has one place here")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_away")
@pytest.mark.parametrize("colours", [False, True], ids=["plain", "colours"])
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("view", ["", "flow", "hierarchy", "compact", "summary", "errors"])
def test_a_view_looks_as_it_did(
    view: str, width: int, colours: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if view in ("summary", "errors") and (colours or width != 80):
        pytest.skip("these have neither colours nor a width")
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["trace", str(TRACES / "day.jsonl"), *([f"--{view}"] if view else [])]) == 0
    shown = capsys.readouterr().out
    picture = TRACES / f"{view or 'trees'}-{width}{'-colours' if colours else ''}.txt"
    if not picture.exists():
        picture.write_text(shown, encoding="utf-8", newline="")
        pytest.fail(f"{picture.name} was not there, and is now: look at it")
    assert shown == picture.read_bytes().decode()
    if view not in ("summary", "errors"):  # which leave texts as they are where no terminal is
        assert ("\x1b[" in shown) == colours
        assert "\x1b[31mred" not in shown
        assert "\u202e" not in shown
        assert "[bold]x[/] :smile:" in shown or view in ("hierarchy", "compact")  # where it is cut


def test_lines_are_no_longer_than_the_terminal_is_wide() -> None:
    for picture in TRACES.glob("*-[0-9]*.txt"):
        width, _, colours = picture.stem.partition("-")[2].partition("-")
        if not colours and not picture.stem.startswith(("summary", "errors")):
            assert max(map(len, picture.read_text(encoding="utf-8").splitlines())) <= int(width), picture.name
