"""Which process is at work, and whether it still lives, as far as this machine can say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fractal._concurrency import owners
from fractal._concurrency.owners import Owner, this_process


def test_this_process_lives():
    assert this_process().is_here
    assert not this_process().is_dead()
    assert str(this_process()) == f"process {os.getpid()}"


def test_a_process_of_another_machine_may_live():
    other = Owner("another", 1, "")
    assert not other.is_dead()
    assert str(other) == "process 1 of another machine"


@pytest.mark.parametrize(("error", "is_dead"), [(ProcessLookupError, True), (PermissionError, False)])
def test_the_system_says_whether_a_process_lives(error: type[OSError], is_dead: bool, monkeypatch: pytest.MonkeyPatch):
    def kill(pid: int, signal: int) -> None:
        raise error

    monkeypatch.setattr(os, "kill", kill)
    assert this_process().is_dead() is is_dead


def test_a_process_that_began_at_another_time_has_taken_the_number_of_a_dead_one():
    me = this_process()
    assert Owner(me.host, me.pid, "1").is_dead() is bool(me.born)


def test_a_machine_that_says_less_goes_by_its_name(monkeypatch: pytest.MonkeyPatch):
    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", read_text)
    host = owners._host.__wrapped__()
    assert len(host) == 16
    assert host == owners._host.__wrapped__()
    assert owners._stat_of(os.getpid()) == ("", "")
