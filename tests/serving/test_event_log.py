"""The log of a run's events: bounded, and read by many, each at its own pace."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from fastapi.sse import format_sse_event

from fractal._json import encode
from fractal.serving import EventLog, LoggedEvent
from fractal.serving.sse import frame
from tests.visits import text_in

RUN = "run_1"


def add(log: EventLog, kind: str, **facts: Any) -> None:
    log.add(kind, json.dumps({"kind": kind, "run_id": RUN, **facts}).encode())


def write(log: EventLog, word: str) -> None:
    log.add_text(word)
    add(log, "text_delta", text=word)


def reply(log: EventLog) -> None:
    log.begin_reply()
    add(log, "model_requested")


def read(events: list[LoggedEvent]) -> str:
    return text_in([{"event": event.kind, "data": event.data} for event in events])


async def test_readers_get_all_events_in_order_whenever_they_come() -> None:
    log = EventLog(RUN, max_events=100, max_bytes=10_000)
    seen: dict[str, list[int]] = {"early": [], "late": []}

    async def reader(name: str) -> None:
        async for events in log.read():
            seen[name] += [event.number for event in events]

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(reader, "early")
            for number in range(10):
                write(log, str(number))
                await anyio.sleep(0)
                if number == 5:
                    group.start_soon(reader, "late")
            log.close()
    assert seen["early"] == seen["late"] == [*range(1, 11)]


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 8, 13])
def test_the_text_is_whole_for_a_reader_that_has_missed_any_part_of_it(kept: int) -> None:
    log = EventLog(RUN, max_events=kept, max_bytes=10_000)
    for answer in ("first answer of two ", "second answer of two "):
        reply(log)
        known = log.last
        for word in answer.split(" "):
            write(log, f"{word} ")
        add(log, "model_responded")
        for after in (0, known):
            events: list[LoggedEvent] = []
            while missing := log.after(events[-1].number if events else after):
                events += missing
            numbers = [event.number for event in events]
            assert numbers == sorted(set(numbers))
            assert numbers[-1] == log.last
            assert read(events).strip() == answer.strip()


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 8, 13])
def test_a_log_made_of_what_another_tells_is_read_alike(kept: int) -> None:
    log = EventLog(RUN, max_events=kept, max_bytes=10_000)
    for answer in ("first answer of two ", "second answer of two "):
        reply(log)
        for word in answer.split(" "):
            write(log, f"{word} ")
        again = EventLog.of_events(RUN, log.to_keep, log.text)
        for after in range(log.last):
            events, number = list[LoggedEvent](), after
            while missing := again.after(number):
                events += missing
                number = events[-1].number
            assert (number, read(events).strip()) == (log.last, answer.strip()) or after >= log.events[0].number - 1


def test_readers_that_have_missed_events_have_none_of_those_that_are_kept_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = EventLog(RUN, max_events=500, max_bytes=2**20)
    reply(log)
    for number in range(1000):
        write(log, f"{number} ")
    looked = list[int]()
    monkeypatch.setattr(LoggedEvent, "data", property(lambda event: looked.append(event.number)))
    gaps = [log.after(number)[0] for number in range(10)]
    assert {gap.kind for gap in gaps} == {"events_skipped"}
    assert looked == []


def test_what_delegates_write_is_no_part_of_the_text() -> None:
    log = EventLog(RUN, max_events=3, max_bytes=10_000)
    reply(log)
    write(log, "own ")
    for _ in range(3):
        log.add("text_delta", json.dumps({"kind": "text_delta", "run_id": "other", "text": "foreign"}).encode())
    assert log.after(0)[0].data["text"] == log.text == "own "


def test_a_log_keeps_no_more_bytes_than_it_may_but_the_newest_event_in_any_case() -> None:
    log = EventLog(RUN, max_events=100, max_bytes=500)
    for _ in range(50):
        write(log, "word ")
    assert sum(len(event.json) for event in log.events) <= 500
    write(log, "x" * 1000)
    assert [len(event.json) > 1000 for event in log.events] == [True]


def test_a_reader_takes_a_bounded_number_of_bytes_at_a_time() -> None:
    log = EventLog(RUN, max_events=1000, max_bytes=2**20)
    for _ in range(100):
        write(log, "x" * 5000)
    sizes, number = list[int](), 0
    while events := log.after(number):
        sizes.append(sum(len(event.json) for event in events))
        number = events[-1].number
    assert number == 100
    assert max(sizes) < 2**16


@pytest.mark.parametrize("text", ["", "a\nb\r\nc\rd", "ü \u2028 \u0085 \0", "data: x\n\nevent: y"])
def test_an_event_is_framed_as_the_frameworks_own_are(text: str) -> None:
    event = LoggedEvent(7, "text_delta", encode({"kind": "text_delta", "text": text}))
    framed = format_sse_event(data_str=event.json.decode(), event=event.kind, id=f"{RUN}.7")
    assert frame(RUN, event) == framed
    assert framed.count(b"\n") == 4
