"""The thread that writes lines to files: in order, whole, never waited for by an event loop."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import anyio
import pytest

from fractal.tracing import jsonl
from fractal.tracing.jsonl import LineWriter
from tests.support import until


@pytest.fixture
def writer() -> LineWriter:
    return LineWriter()


def ended(writer: LineWriter) -> bool:
    until = time.monotonic() + 5
    while writer._bell is not None and time.monotonic() < until:
        time.sleep(0.01)
    return writer._bell is None and not writer._files


async def test_lines_are_in_order_and_there_when_they_are_waited_for(tmp_path: Path, writer: LineWriter) -> None:
    path = tmp_path / "deep" / "down" / "trace.jsonl"
    for number in range(1000):
        writer.write(str(path), b"%d" % number)
    await writer.settle()
    assert path.read_text().splitlines() == [str(number) for number in range(1000)]
    writer.write(str(path), b"more")
    await writer.settle()
    assert path.read_text().endswith("999\nmore\n")


async def test_whoever_waits_at_any_moment_is_woken(tmp_path: Path, writer: LineWriter) -> None:
    path = tmp_path / "a"
    with anyio.fail_after(20):
        for number in range(200):
            writer.write(str(path), b"x")
            if number % 3:
                await anyio.sleep(0.0005 * (number % 7))
            await writer.settle()
            assert path.read_bytes() == b"x\n" * (number + 1)


async def test_whoever_waits_for_what_is_being_written_is_woken(
    tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, real = threading.Event(), threading.Event(), os.write

    def hold(descriptor: int, data: bytes) -> int:
        begun.set()
        goes_on.wait(10)
        return real(descriptor, data)

    monkeypatch.setattr(jsonl.os, "write", hold)
    writer.write(str(tmp_path / "a"), b"x")
    assert begun.wait(10)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(writer.settle)
            await anyio.wait_all_tasks_blocked()
            goes_on.set()
    assert writer.flush()


def test_a_disk_that_is_quick_is_waited_for_in_place(
    tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MOMENT", 20.0)
    for number in range(100):
        writer.write(str(tmp_path / "a"), b"x")
        assert writer.catch_up()
        assert (tmp_path / "a").read_bytes() == b"x\n" * (number + 1)


def test_many_threads_wait_at_once(tmp_path: Path, writer: LineWriter) -> None:
    written: list[bool] = []

    def work(name: str) -> None:
        for number in range(50):
            writer.write(str(tmp_path / name), b"x")
            written.append(writer.flush(20))
            written.append((tmp_path / name).read_bytes() == b"x\n" * (number + 1))

    threads = [threading.Thread(target=work, args=(f"{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 800
    assert all(written)


def test_a_disk_that_hangs_is_waited_for_in_place_once(
    tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, real = threading.Event(), os.write

    def hang(descriptor: int, data: bytes) -> int:
        goes_on.wait(30)
        return real(descriptor, data)

    monkeypatch.setattr(jsonl.os, "write", hang)
    try:
        writer.write(str(tmp_path / "a"), b"x")
        assert not writer.catch_up()
        monkeypatch.setattr(jsonl, "MOMENT", 60.0)
        began = time.monotonic()
        assert not any([writer.catch_up() for _ in range(100)])
        assert time.monotonic() - began < 20
    finally:
        goes_on.set()
    assert writer.flush(20)
    monkeypatch.undo()
    monkeypatch.setattr(jsonl, "MOMENT", 20.0)
    writer.write(str(tmp_path / "a"), b"y")
    assert writer.flush(20)  # a quick one, after which it is waited for again
    writer.write(str(tmp_path / "a"), b"z")
    assert writer.catch_up()


def test_the_thread_and_its_files_are_gone_when_there_is_no_more(tmp_path: Path, writer: LineWriter) -> None:
    writer.write(str(tmp_path / "a"), b"x")
    assert writer.flush()
    assert ended(writer)
    writer.write(str(tmp_path / "a"), b"y")
    assert writer.flush()
    assert (tmp_path / "a").read_bytes() == b"x\ny\n"
    assert ended(writer)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_file_that_is_moved_or_removed_is_begun_anew_while_lines_keep_coming(
    is_kept: bool, tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_FRESH", 0.05)
    path, moved = tmp_path / "a", tmp_path / "a.1"
    writer.write(str(path), b"before")
    assert writer.flush()
    path.rename(moved)
    if not is_kept:
        moved.unlink()
    count = 0

    def is_there() -> bool:
        nonlocal count
        count += 1
        writer.write(str(path), b"%d" % count)
        return path.exists()

    until(is_there)
    assert writer.flush()
    lines = moved.read_bytes().split() if is_kept else []
    assert lines[:1] == ([b"before"] if is_kept else [])
    lines = lines[1:] + path.read_bytes().split()
    assert lines[-1] == b"%d" % count
    assert not is_kept or [int(line) for line in lines] == list(range(1, count + 1))


def test_a_line_that_comes_while_the_thread_has_nothing_to_do_is_written_soon(
    tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_LINGER", 60.0)
    writer.write(str(tmp_path / "a"), b"x")
    assert writer.flush()
    until(lambda: writer._is_idle)
    bell = writer._bell
    writer.write(str(tmp_path / "a"), b"y")
    until(lambda: (tmp_path / "a").read_bytes() == b"x\ny\n")
    assert bell is not None
    assert writer._bell is bell
    until(lambda: writer._is_idle)
    monkeypatch.undo()
    bell.ring()
    assert ended(writer)


def test_many_threads_write_whole_lines(tmp_path: Path, writer: LineWriter) -> None:
    path = tmp_path / "a"

    def work(name: bytes) -> None:
        for _ in range(200):
            writer.write(str(path), name * 100)

    threads = [threading.Thread(target=work, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 1600
    assert {len(set(line)) for line in lines} == {1}


def test_after_half_a_line_of_a_crash_comes_a_line_of_its_own(tmp_path: Path, writer: LineWriter) -> None:
    (tmp_path / "a").write_bytes(b'{"whole":1}\n{"ha')
    writer.write(str(tmp_path / "a"), b"{}")
    assert writer.flush()
    assert (tmp_path / "a").read_bytes() == b'{"whole":1}\n{"ha\n{}\n'


async def test_more_files_than_are_kept_open(tmp_path: Path, writer: LineWriter) -> None:
    for number in range(300):
        writer.write(str(tmp_path / f"{number % 100}"), b"%d" % number)
    await writer.settle()
    assert len(writer._files) <= 32
    assert (tmp_path / "7").read_bytes() == b"7\n107\n207\n"


async def test_a_file_that_cannot_be_written_is_told_once_and_the_others_go_on(
    tmp_path: Path, writer: LineWriter, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(3):
        writer.write(str(tmp_path / "file" / "below"), b"x")
        writer.write("nul\0", b"x")
        writer.write(str(tmp_path / "good"), b"x")
        await writer.settle()
    assert (tmp_path / "good").read_bytes() == b"x\n" * 3
    assert writer.dropped == 6
    assert caplog.text.count("cannot be written") == 2
    assert caplog.text.count("not whole") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk is always full here")
async def test_a_disk_that_is_full_is_told(writer: LineWriter, caplog: pytest.LogCaptureFixture) -> None:
    writer.write("/dev/full", b"x")
    await writer.settle()
    assert writer.dropped == 1
    assert "No space left" in caplog.text


async def test_a_disk_that_hangs_keeps_no_event_loop_waiting(
    tmp_path: Path, writer: LineWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, real = threading.Event(), os.write

    def hang(descriptor: int, data: bytes) -> int:
        goes_on.wait(30)
        return real(descriptor, data)

    monkeypatch.setattr(jsonl, "MOST_WAITING", 1000)
    monkeypatch.setattr(jsonl.os, "write", hang)
    path = str(tmp_path / "a")
    try:
        writer.write(path, b"x")
        began = time.monotonic()
        with anyio.move_on_after(1) as scope:
            await writer.settle()
        assert scope.cancelled_caught
        with anyio.fail_after(0.5):
            await writer.settle()  # nobody else waits for it
        for _ in range(1000):
            writer.write(path, b"y" * 100)
        assert time.monotonic() - began < 3
        assert writer.dropped > 900
    finally:
        goes_on.set()
    assert writer.flush()
    lines = (tmp_path / "a").read_bytes().splitlines()
    assert len(lines) == 1001 - writer.dropped


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_writes_its_own_lines_and_not_its_parents(tmp_path: Path, writer: LineWriter) -> None:
    path = str(tmp_path / "a")
    writer.write(path, b"parent")
    child = os.fork()
    if not child:
        try:
            writer.begin_anew()
            writer.write(path, b"child")
            writer.flush()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert writer.flush()
    assert sorted(Path(path).read_bytes().splitlines()) == [b"child", b"parent"]
