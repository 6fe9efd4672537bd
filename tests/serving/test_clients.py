"""Clients that wait for runs: which of them are watched, and how soon it is seen that one has gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import sniffio

from fractal._concurrency.timers import Delay
from fractal.serving import ServedRuns
from fractal.serving.record import MemoryStore, RunRecord
from fractal.serving.run import RunAsked, ServedRun
from fractal.testing import ScriptedModel, answers
from tests.serving.support import Shop, served
from tests.visits import Visit

ASKED = RunAsked(input="Find it")


async def _begun(runs: ServedRuns) -> ServedRun:
    run = await runs.begin(None, ASKED)
    assert isinstance(run, ServedRun)
    return run


async def test_no_task_watches_the_client_of_a_short_run_where_event_loops_have_timers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fractal.serving.clients._UNWATCHED", Delay(60.0))  # however slow the machine is
    runs, watched = ServedRuns(Shop("found")), list[bool]()

    async def gone() -> None:
        watched.append(True)
        await anyio.sleep_forever()

    with anyio.fail_after(10):
        record = await runs.finished(await _begun(runs), gone)
    assert record is not None
    assert record.state == "finished"
    assert watched == ([] if sniffio.current_async_library() == "asyncio" else [True])


async def test_a_client_that_goes_before_it_is_watched_cancels_its_run_soon() -> None:
    runs = ServedRuns(agent := Shop(answers.call("search")))

    async def has_gone_already() -> None:
        await anyio.lowlevel.checkpoint()

    run, begun = await _begun(runs), anyio.current_time()
    with anyio.fail_after(10):
        record = await runs.finished(run, has_gone_already)
    assert record is not None
    assert (record.state, agent.cleaned_up.is_set()) == ("cancelled", agent.searching.is_set())
    assert anyio.current_time() - begun < 5


async def test_a_client_that_goes_while_its_run_waits_for_its_turn_frees_its_place() -> None:
    runs = ServedRuns(agent := Shop(answers.call("search"), "done"), max_concurrency=1)
    async with anyio.create_task_group() as group:
        group.start_soon(runs.finished, await _begun(runs), anyio.sleep_forever)
        await agent.searching.wait()
        run = await _begun(runs)
        with anyio.fail_after(10):
            record = await runs.finished(run, anyio.lowlevel.checkpoint)
        assert record is not None
        assert (record.state, runs.turn.waiting) == ("cancelled", 0)
        agent.let_go.set()


async def test_what_a_server_raises_while_a_client_is_watched_reaches_whoever_waits() -> None:
    runs = ServedRuns(agent := Shop(answers.call("search"), "done"))

    async def gone() -> None:
        agent.let_go.set()
        raise OSError("no such connection")

    with anyio.fail_after(10), pytest.raises(OSError, match="no such connection"):
        await runs.finished(await _begun(runs), gone)


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_a_run_that_has_ended_is_freed_without_the_garbage_collector() -> None:
    runs = ServedRuns(Shop("found"))
    with _without_collector():
        run = await _begun(runs)
        is_there = weakref.ref(run)
        await runs.finished(run, anyio.sleep_forever)
        del run
        assert is_there() is None


async def test_a_store_made_of_the_one_in_memory_is_asked_to_save() -> None:
    saved = list[str]()

    class Noting(MemoryStore):
        async def save(self, record: RunRecord) -> None:
            await super().save(record)
            saved.append(record.id)

    runs = ServedRuns(Shop("found"), store=Noting())
    run = await _begun(runs)
    await runs.finished(run, anyio.sleep_forever)
    assert saved == [run.id]
    assert await runs.find(run.id) == run.record()


async def test_a_run_that_nobody_watches_makes_its_events_for_whoever_reads_them_later() -> None:
    saving, let_save = anyio.Event(), anyio.Event()

    class Slow(MemoryStore):
        async def save(self, record: RunRecord) -> None:
            saving.set()
            await let_save.wait()
            await super().save(record)

    runs = ServedRuns(Shop("found"), store=Slow())
    run = await _begun(runs)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(runs.finished, run, anyio.sleep_forever)
            await saving.wait()
            assert (run.log.last, run.record().events) == (0, ())
            found = await runs.find(run.id)  # it has ended, and is not kept yet
            while_saving = [events async for events in found.log.read()]
            let_save.set()
        kept = await runs.find(run.id)
        assert kept == run.record()
        assert [events async for events in kept.log.read()] == while_saving
    assert [event.kind for event in while_saving[0]] == ["events_skipped", "run_finished"]
    assert [event.number for event in while_saving[0]] == [1, 2]
    assert while_saving[0][0].data["text"] == while_saving[0][1].data["result"]["content"] == "found"


class _Unable(MemoryStore):
    """A store that cannot be reached, or does not answer."""

    hangs = False

    async def _fail(self) -> Any:
        if self.hangs:
            await anyio.sleep_forever()
        raise OSError("postgres://user:secret@host")

    async def load(self, run_id: str) -> RunRecord | None:
        return await self._fail()

    async def find(self, owner: str | None, key: str) -> RunRecord | None:
        return await self._fail()

    async def page(self, owner: str | None, before: tuple[float, str] | None, limit: int) -> list[RunRecord]:
        return await self._fail()


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("GET", "/runs/run_1", None),
        ("GET", "/runs", None),
        ("DELETE", "/runs/run_1", None),
        ("GET", "/runs/run_1/stream", None),
        ("POST", "/runs", "k"),
        ("POST", "/runs/stream", "k"),
    ],
)
async def test_a_store_that_cannot_tell_is_a_503_and_no_run_is_begun_meanwhile(
    method: str, path: str, key: str | None, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fractal.serving.registry.STORE_SECONDS", 0.05)
    store = _Unable()
    store.hangs = hangs
    async with served(agent := Shop("found"), store=store) as app:
        headers = {} if key is None else {"Idempotency-Key": key}
        visit = Visit(method, path, json={"input": "Find it"} if key else None, headers=headers)
        await visit.to(app)
    assert (visit.status, visit.json["reason"], visit.headers["retry-after"]) == (503, "store_failed", "1")
    assert "secret" not in visit.body.decode()
    assert isinstance(agent.client, ScriptedModel)
    assert agent.client.requests == []
