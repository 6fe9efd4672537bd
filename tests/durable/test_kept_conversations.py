"""Conversations in stores: kept whenever they are whole, never overwritten, and readable whatever happened."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from fractal import (
    AgentResult,
    BaseAgent,
    ConversationConflict,
    ConversationExists,
    ConversationNotFound,
    Defer,
    InvalidArguments,
    InvalidMessages,
    Limits,
    RunFinished,
    StoreError,
    StoreUnavailable,
    StoreUnreadable,
    run_many,
    sync,
    tool,
)
from fractal.durable import (
    Conversation,
    Conversations,
    MemoryJournal,
    PostgresConversations,
    SQLiteConversations,
    conversations_sqlite,
    memory,
)
from fractal.testing import ScriptedModel, answers, cancel_everywhere, check_messages
from tests.databases import postgres
from tests.support import BACKENDS, in_thread

ROOT = Path(__file__).parents[2]
WAYS = ("run", "stream", "sync.run", "sync.stream")


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Without uvloop: what is here is done in threads."""
    return request.param


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as conninfo:
        yield conninfo


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Conversations:
    if request.param == "sqlite":
        return SQLiteConversations(tmp_path / "talks.db")
    conninfo = request.getfixturevalue("server")  # without one the test is skipped
    import psycopg

    with psycopg.connect(conninfo, autocommit=True) as connection:
        names = "fractal_conversations, fractal_conversation_messages, fractal_conversations_version"
        connection.execute(f"DROP TABLE IF EXISTS {names}")
    return PostgresConversations(conninfo)


@tool
async def look(n: int) -> dict[str, int]:
    """Look."""
    return {"seen": n}


def talker(*script: Any, **options: Any) -> BaseAgent:
    return BaseAgent("Talker", "You talk.", client=ScriptedModel(list(script)), **options).add_tool(look)


def a_call(n: int = 1) -> Any:
    return answers.calls(answers.call("look", {"n": n}, id=f"c{n}"))


async def ask(way: str, agent: BaseAgent, asked: str, conversation: Conversation, **options: Any) -> AgentResult:
    match way:
        case "run":
            return await agent.run(asked, conversation=conversation, **options)
        case "stream":
            async with agent.stream(asked, conversation=conversation, **options) as stream:
                return await stream.result()
        case "sync.run":
            return await in_thread(lambda: sync.run(agent, asked, conversation=conversation, **options))
        case _:

            def drain() -> AgentResult:
                with sync.stream(agent, asked, conversation=conversation, **options) as stream:
                    return stream.result()

            return await in_thread(drain)


async def messages_in(store: Conversations, one: str) -> list[dict[str, Any]]:
    async with store.open(one) as conversation:
        return conversation.messages


def roles(messages: list[dict[str, Any]]) -> list[str]:
    return [message["role"] for message in messages]


# ---- going on


@pytest.mark.parametrize("way", WAYS)
async def test_a_conversation_goes_on_where_it_was_and_is_what_the_result_says(way: str, store: Conversations):
    agent = talker(a_call(), "first «é» \u2028 \x00 😀", "second")
    async with store.open("trip") as conversation:
        first = await ask(way, agent, "one", conversation)
        assert first.success
        assert conversation.messages == first.messages
    async with store.open("trip") as conversation:
        assert conversation.messages == first.messages
        second = await ask(way, agent, "two", conversation)
        assert conversation.messages == second.messages
        assert roles(second.messages) == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert await messages_in(store, "trip") == second.messages


def test_blocking_code_opens_it_too(store: Conversations, backend: str):
    agent = talker("first", "second")
    with sync.portal(backend=backend):  # type: ignore[arg-type]
        for question in ("one", "two"):
            with sync.enter(store.open("trip")) as conversation:
                assert sync.run(agent, question, conversation=conversation).success
        assert [one.length for one in sync.call(store.list)] == [4]
        assert sync.call(store.export, "trip")["messages"][-1]["content"] == "second"


async def test_what_a_tool_has_done_is_kept_before_the_model_is_asked_again(store: Conversations):
    seen: list[list[str]] = []

    async def around(ctx: Any, request: Any, call_next: Any) -> Any:
        seen.append(roles(await messages_in(store, "trip")))
        return await call_next(request)

    agent = talker(a_call(1), a_call(2), "done")
    async with store.open("trip") as conversation:
        await agent.run("go", conversation=conversation, around_model=around)
    turn = ["assistant", "tool"]
    assert seen == [[], ["user", *turn], ["user", *turn, *turn]]


async def test_the_end_is_told_once_the_answer_is_kept(store: Conversations):
    agent = talker("done")
    async with store.open("trip") as conversation, agent.stream("go", conversation=conversation) as stream:
        kept = [len(await messages_in(store, "trip")) async for event in stream if isinstance(event, RunFinished)]
    assert kept == [2]


# ---- failure and cancellation


async def test_a_question_that_has_led_to_nothing_is_not_kept(store: Conversations):
    agent = talker("first", answers.failure(400, "no"), "third")
    async with store.open("trip") as conversation:
        first = await agent.run("one", conversation=conversation)
        assert not (await agent.run("two", conversation=conversation, max_retries=0)).success
        assert conversation.messages == first.messages
        assert (await agent.run("three", conversation=conversation)).success
    assert [m["content"] for m in await messages_in(store, "trip")] == ["one", "first", "three", "third"]


async def test_what_a_failed_run_has_done_is_kept(store: Conversations):
    agent = talker(a_call(), answers.failure(400, "no"))
    async with store.open("trip") as conversation:
        result = await agent.run("go", conversation=conversation, max_retries=0)
        assert result.stop_reason == "model_error"
        assert conversation.messages == result.messages
    assert roles(await messages_in(store, "trip")) == ["user", "assistant", "tool"]


@pytest.mark.parametrize("is_own_deadline", [True, False], ids=["its deadline", "a scope around it"])
async def test_a_run_that_was_cut_keeps_its_calls_with_results(store: Conversations, is_own_deadline: bool):
    async def hang() -> None:
        await anyio.sleep_forever()

    agent = talker(answers.calls(answers.call("hang", {}, id="h"))).add_tool(hang)
    async with store.open("trip") as conversation:
        if is_own_deadline:
            result = await agent.run("go", conversation=conversation, timeout=0.3)
            assert result.stop_reason == "deadline"
        else:
            with anyio.move_on_after(0.3):
                await agent.run("go", conversation=conversation)
        check_messages(conversation.messages)
    messages = await messages_in(store, "trip")
    assert roles(messages) == ["user", "assistant", "tool"]
    check_messages([*messages, {"role": "user", "content": "and now?"}])


async def go_on_elsewhere(store: Conversations) -> None:
    async with store.open("trip") as other:
        await other.append([{"role": "user", "content": "from elsewhere"}])


async def test_a_failure_that_cannot_be_kept_is_told_with_all_that_was_said(store: Conversations):
    @tool(on_error="raise")
    async def go_on() -> None:
        """Go on."""
        await go_on_elsewhere(store)
        raise ValueError("no")

    agent = talker(answers.calls(answers.call("go_on", {}, id="g"))).add_tool(go_on)
    async with store.open("trip") as conversation:
        with pytest.raises(ConversationConflict) as caught:
            await agent.run("go", conversation=conversation)
    assert roles(caught.value.result.messages) == ["user", "assistant", "tool"]


@pytest.mark.parametrize("is_locked", [False, True], ids=["conflict", "locked"])
async def test_a_cancellation_goes_before_what_cannot_be_kept_which_is_warned_of(is_locked: bool, tmp_path: Path):
    store, ends = SQLiteConversations(tmp_path / "talks.db", patience=50), list[RunFinished]()
    scope = anyio.CancelScope()

    async def stop() -> None:
        if is_locked:
            other.execute("BEGIN IMMEDIATE")
        else:
            await go_on_elsewhere(store)
        scope.cancel()
        await anyio.sleep_forever()

    def see(event: object) -> None:
        if isinstance(event, RunFinished):
            ends.append(event)

    agent = talker(answers.calls(answers.call("stop", {}, id="s")), observers=[see], limits=Limits(grace=0.3))
    agent.add_tool(stop)
    async with store.open("trip") as conversation:
        other = sqlite3.connect(tmp_path / "talks.db", isolation_level=None)
        with closing(other), anyio.fail_after(20), scope:
            await agent.run("go", conversation=conversation)
    assert scope.cancelled_caught
    [end] = ends
    assert end.result.stop_reason == "cancelled"
    assert any("what was said is not kept" in warning for warning in end.result.warnings)
    assert roles(end.result.messages) == ["user", "assistant", "tool"]


@pytest.mark.slow
def test_wherever_a_run_is_cancelled_the_conversation_is_whole(tmp_path: Path):
    store, number = SQLiteConversations(tmp_path / "talks.db"), 0

    async def scenario() -> None:
        nonlocal number
        number += 1
        async with store.open(f"talk {number}") as conversation:
            await talker(a_call(1), "one").run("go", conversation=conversation)
            await talker("two").run("on", conversation=conversation)

    report = cancel_everywhere(scenario)
    assert report

    async def look_at_all() -> set[int]:
        lengths = set[int]()
        for info in await store.list(limit=10_000):
            messages = await messages_in(store, info.id)
            check_messages([*messages, {"role": "user", "content": "and now?"}])
            lengths.add(len(messages))
        return lengths

    assert anyio.run(look_at_all) >= {3, 4, 6}


# ---- several writers


async def test_the_second_of_two_writers_learns_it_before_a_model_is_asked(store: Conversations):
    async with store.open("trip") as one, store.open("trip") as other:
        await talker("first").run("one", conversation=one)
        model = ScriptedModel(["second"])
        agent = BaseAgent("Talker", "You talk.", client=model)
        with pytest.raises(ConversationConflict) as caught:
            await agent.run("two", conversation=other)
        assert (caught.value.conversation_id, caught.value.expected, caught.value.found) == ("trip", 0, 1)
        assert caught.value.result.messages == [{"role": "user", "content": "two"}]
        assert not model.requests
        await other.reload()
        assert (await agent.run("two", conversation=other)).success
    assert [m["content"] for m in await messages_in(store, "trip")] == ["one", "first", "two", "second"]


@pytest.mark.parametrize("way", WAYS)
async def test_of_two_runs_at_once_one_is_kept_and_nothing_of_the_other_is_lost(way: str, store: Conversations):
    async with store.open("trip") as one, store.open("trip") as other:

        async def go_on_elsewhere() -> str:
            await talker("from elsewhere").run("elsewhere", conversation=other)
            return "done"

        agent = talker(answers.calls(answers.call("go_on_elsewhere", {}, id="g"))).add_tool(go_on_elsewhere)
        with pytest.raises(ConversationConflict) as caught:
            await ask(way, agent, "here", one)
        assert roles(caught.value.result.messages) == ["user", "assistant", "tool"]
        assert [m["content"] for m in await messages_in(store, "trip")] == ["elsewhere", "from elsewhere"]
        async with store.open("trip, the other way") as branch:
            await branch.append(caught.value.result.messages)
    assert roles(await messages_in(store, "trip, the other way")) == ["user", "assistant", "tool"]


async def test_two_runs_at_once_on_one_open_conversation_do_not_mix(store: Conversations):
    agent, outcomes = talker("a", "b"), list[str]()

    async def one_run(conversation: Conversation, question: str) -> None:
        try:
            outcomes.append((await agent.run(question, conversation=conversation)).content)
        except ConversationConflict:
            outcomes.append("conflict")

    async with store.open("trip") as conversation:
        async with anyio.create_task_group() as group:
            group.start_soon(one_run, conversation, "one")
            group.start_soon(one_run, conversation, "two")
        assert len(conversation.messages) == 2
        assert conversation.messages == await messages_in(store, "trip")
    assert len(outcomes) == 2
    assert "conflict" in outcomes


async def test_writers_that_read_again_after_a_conflict_lose_nothing(store: Conversations):
    async def write(name: str) -> None:
        async with store.open("log") as conversation:
            for number in range(5):
                while True:
                    try:
                        await conversation.append([{"role": "user", "content": f"{name}{number}"}])
                        break
                    except ConversationConflict:
                        await conversation.reload()

    async with anyio.create_task_group() as group:
        for name in "abcd":
            group.start_soon(write, name)
    said = [message["content"] for message in await messages_in(store, "log")]
    assert sorted(said) == sorted(f"{name}{number}" for name in "abcd" for number in range(5))
    for name in "abcd":
        assert [each for each in said if each[0] == name] == [f"{name}{number}" for number in range(5)]


async def test_a_conversation_that_was_deleted_and_made_again_is_another_one(store: Conversations):
    async with store.open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "old"}])
        assert await store.delete("trip")
        async with store.open("trip") as other:
            await other.append([{"role": "user", "content": "new"}])
        with pytest.raises(ConversationConflict):
            await conversation.append([{"role": "user", "content": "older"}])
    assert [m["content"] for m in await messages_in(store, "trip")] == ["new"]


# ---- fork, list, delete, export


async def test_a_fork_goes_its_own_way(store: Conversations):
    async with store.open("trip") as conversation:
        await talker(a_call(), "first").run("one", conversation=conversation)
        info = await conversation.fork("other trip", length=3)
        assert (info.id, info.length, info.revision) == ("other trip", 3, 1)
        for cut in (2, 9, 0, -1, True):
            with pytest.raises(InvalidArguments, match="length="):
                await conversation.fork("third", length=cut)
        with pytest.raises(ConversationExists):
            await store.fork("trip", "other trip")
        with pytest.raises(ConversationNotFound):
            await store.fork("nothing", "third")
    async with store.open("other trip") as other:
        await other.append([{"role": "user", "content": "else"}])
    assert len(await messages_in(store, "trip")) == 4
    assert roles(await messages_in(store, "other trip")) == ["user", "assistant", "tool", "user"]
    assert [one.id for one in await store.list()] == ["other trip", "trip"]


async def test_conversations_are_listed_by_pages_and_prefixes(store: Conversations):
    ids = ["a/1", "a/2", "a/ü", "aa", "b/1", "a%", "A/1", "a/😀"]
    for one in ids:
        async with store.open(one) as conversation:
            await conversation.append([{"role": "user", "content": one}])
    assert [one.id for one in await store.list()] == sorted(ids)
    assert [one.id for one in await store.list(prefix="a/")] == ["a/1", "a/2", "a/ü", "a/😀"]
    assert [one.id for one in await store.list(prefix="a/", after="a/1", limit=2)] == ["a/2", "a/ü"]
    assert await store.list(prefix="%") == []
    [info] = await store.list(prefix="b")
    assert (info.revision, info.length) == (1, 1)
    assert abs(info.created.timestamp() - time.time()) < 60
    assert info.created <= info.changed
    for wrong in (0, 10_001, True, "1"):
        with pytest.raises(InvalidArguments, match="limit="):
            await store.list(limit=wrong)  # type: ignore[arg-type]


async def test_an_export_is_one_object_of_json(store: Conversations):
    async with store.open("trip") as conversation:
        result = await talker(a_call(), "first").run("one", conversation=conversation)
    exported = json.loads(json.dumps(await store.export("trip")))
    assert exported["messages"] == result.messages
    assert (exported["format"], exported["version"], exported["id"]) == ("fractal-conversation", 1, "trip")
    assert await store.delete("trip")
    assert not await store.delete("trip")
    with pytest.raises(ConversationNotFound):
        await store.export("trip")


# ---- ids and messages are data


ODD = ["../../etc/passwd", "/etc/passwd", "x'; DROP TABLE fractal_conversations; --", '"', "%", "?", "%s", "a\\b", "$1"]


async def test_ids_are_data(store: Conversations, tmp_path: Path):
    for one in ODD:
        async with store.open(one) as conversation:
            await conversation.append([{"role": "user", "content": one}])
        assert [info.id for info in await store.list(prefix=one)] == [one]
        assert [m["content"] for m in await messages_in(store, one)] == [one]
    assert [info.id for info in await store.list()] == sorted(ODD)
    for number, one in enumerate(ODD, 1):
        assert await store.delete(one)
        assert len(await store.list()) == len(ODD) - number
    assert {*os.listdir(tmp_path)} <= {"talks.db", "talks.db-wal", "talks.db-shm"}


async def test_what_cannot_be_an_id_is_refused(tmp_path: Path):
    store = SQLiteConversations(tmp_path / "talks.db")
    for one in ("", "x" * 201, "a\0b", "a\nb", "\x1b[2J", "\x9b", "\ud800", None, 7, b"x"):
        await _is_no_id(store, one)
    assert not os.listdir(tmp_path)


async def _is_no_id(store: Conversations, one: Any) -> None:
    with pytest.raises(InvalidArguments, match="conversation_id="):
        store.open(one)
    for verb in (store.delete, store.export, lambda one: store.fork(one, "x")):
        with pytest.raises(InvalidArguments, match="conversation_id="):
            await verb(one)
    with pytest.raises(InvalidArguments, match="new_id="):
        await store.fork("x", one)
    if one != "":
        with pytest.raises(InvalidArguments, match="prefix="):
            await store.list(prefix=one)


async def test_only_what_an_endpoint_accepts_is_kept(store: Conversations):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    async with store.open("trip") as conversation:
        for wrong in ([{"role": "assistant", "content": None, "tool_calls": [call]}], [{"role": "robot"}]):
            with pytest.raises(InvalidMessages):
                await conversation.append(wrong)
        await conversation.append([])
    assert await store.list() == []


async def test_a_conversation_that_grows_too_long_is_refused_and_stays(store: Conversations, monkeypatch: Any):
    monkeypatch.setattr("fractal.durable.conversations_sql.LONGEST", 1000)
    async with store.open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x" * 800}])
        with pytest.raises(StoreError, match="begin another"):
            await conversation.append([{"role": "user", "content": "x" * 800}])
        assert len(conversation.messages) == 1
    assert len(await messages_in(store, "trip")) == 1


# ---- wrong use


async def test_wrong_use_is_refused(store: Conversations, tmp_path: Path):
    agent = talker("x")
    async with store.open("trip") as conversation:
        with pytest.raises(InvalidArguments, match="two histories"):
            await agent.run("go", messages=[{"role": "user", "content": "x"}], conversation=conversation)
        with pytest.raises(InvalidArguments, match="leave it out of a batch"):
            await run_many(agent, ["a", "b"], conversation=conversation)
        with pytest.raises(InvalidArguments, match="open already"):
            await conversation.__aenter__()
    for closed in (conversation, store.open("trip")):
        with pytest.raises(InvalidArguments, match="is not open"):
            await agent.run("go", conversation=closed)
        with pytest.raises(InvalidArguments, match="is not open"):
            await closed.append([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidArguments, match="conversation="):
        await agent.run("go", conversation="trip")  # type: ignore[arg-type]
    for path in ("", ":memory:", 7, None, "a\0b"):
        with pytest.raises(InvalidArguments, match="path="):
            SQLiteConversations(path)  # type: ignore[arg-type]
    for patience in (-1, float("nan"), float("inf"), True, "5"):
        with pytest.raises(InvalidArguments, match="patience="):
            SQLiteConversations(tmp_path / "x.db", patience=patience)  # type: ignore[arg-type]


# ---- files


async def test_a_new_file_is_for_its_owner_alone(tmp_path: Path):
    path = tmp_path / "talks.db"
    async with SQLiteConversations(path).open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
        modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert modes == {0o600}


async def test_a_database_of_other_things_is_left_as_it_is(tmp_path: Path):
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE orders (n)")
        other.execute("INSERT INTO orders VALUES (7)")
        other.commit()
    async with SQLiteConversations(path).open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
    with closing(sqlite3.connect(path)) as other:
        assert [*other.execute("SELECT n FROM orders")] == [(7,)]
        assert [*other.execute("PRAGMA journal_mode")] == [("delete",)]


def _change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            other.execute(statement)
        other.commit()


QUESTION = {"role": "user", "content": "x"}
MESSAGES = "fractal_conversation_messages"
HOSTILE: dict[str, tuple[str, ...]] = {
    "newer": ("UPDATE fractal_conversations_version SET version = 2",),
    "older": ("UPDATE fractal_conversations_version SET version = 0",),
    "no version": ("DELETE FROM fractal_conversations_version",),
    "no such version": ("UPDATE fractal_conversations_version SET version = 'x'",),
    "a trigger": (f"CREATE TRIGGER t AFTER INSERT ON {MESSAGES} BEGIN DELETE FROM {MESSAGES}; END",),
    "a view": (f"DROP TABLE {MESSAGES}", f"CREATE VIEW {MESSAGES} AS SELECT 1 AS x"),
    "a table is missing": (f"DROP TABLE {MESSAGES}",),
    "other columns": (f"ALTER TABLE {MESSAGES} ADD COLUMN more",),
    "a message is missing": (f"DELETE FROM {MESSAGES} WHERE position = 1",),
    "the last one is missing": (f"DELETE FROM {MESSAGES} WHERE position = 2",),
    "a message more": (f"INSERT INTO {MESSAGES} VALUES ('trip', 3, '{{}}', NULL)",),
    "no JSON": (f"UPDATE {MESSAGES} SET message = '{{' WHERE position = 1",),
    "no message": (f"UPDATE {MESSAGES} SET message = '[7]' WHERE position = 1",),
    "no text": (f"UPDATE {MESSAGES} SET message = x'00ff' WHERE position = 1",),
    "no valid history": (f"UPDATE {MESSAGES} SET message = '{json.dumps(QUESTION)}' WHERE position = 1",),
    "deeply nested": (f"UPDATE {MESSAGES} SET message = '{'[' * 100_000}' WHERE position = 1",),
    "no run": (f"UPDATE {MESSAGES} SET run = x'00' WHERE position = 1",),
    "no revision": ("UPDATE fractal_conversations SET revision = 'x'",),
    "no mark": ("UPDATE fractal_conversations SET mark = x'00'",),
    "negative": ("UPDATE fractal_conversations SET length = -3",),
}


async def test_what_somebody_else_has_written_into_the_file_is_a_typed_error(tmp_path: Path):
    path = tmp_path / "talks.db"
    async with SQLiteConversations(path).open("trip") as conversation:
        await talker(a_call()).run("go", conversation=conversation, max_iterations=1)
    for what, statements in HOSTILE.items():
        other = tmp_path / f"{what}.db"
        shutil.copy(path, other)
        _change(other, *statements)
        with pytest.raises(StoreUnreadable) as caught:
            await messages_in(SQLiteConversations(other), "trip")
        assert caught.value.store == str(other)
        if what == "newer":
            assert "version 2" in str(caught.value)


@pytest.mark.parametrize("moment", ["1e300", "'x'", "x'00'"])
async def test_a_moment_that_is_none_is_a_typed_error(moment: str, tmp_path: Path):
    path = tmp_path / "talks.db"
    store = SQLiteConversations(path)
    async with store.open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
    _change(path, f"UPDATE fractal_conversations SET changed = {moment}")
    for read in (store.list(), store.export("trip")):
        with pytest.raises(StoreUnreadable, match="damaged"):
            await read
    assert len(await messages_in(store, "trip")) == 1  # what is needed to go on is there


def _broken(kind: str, path: Path) -> None:
    match kind:
        case "text":
            path.write_text("this is no database " * 100)
        case "zeros":
            path.write_bytes(bytes(8192))
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case _:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["text", "zeros", "directory", "pipe", "device"])
async def test_what_is_no_store_is_a_typed_error(kind: str, tmp_path: Path):
    path = tmp_path / "talks.db"
    _broken(kind, path)
    before = path.read_bytes() if kind in ("text", "zeros") else b""
    with anyio.fail_after(10):
        with pytest.raises(StoreUnreadable):
            async with SQLiteConversations(path).open("trip"):
                pass
        with pytest.raises(StoreUnreadable):
            await SQLiteConversations(path).list()
    assert kind not in ("text", "zeros") or path.read_bytes() == before


async def test_a_directory_that_is_missing_is_a_typed_error(tmp_path: Path):
    with pytest.raises(StoreUnavailable, match="No such file or directory"):
        await SQLiteConversations(tmp_path / "no" / "talks.db").list()


async def test_a_torn_file_gives_what_was_kept_or_a_typed_error(tmp_path: Path):
    path = tmp_path / "talks.db"
    async with SQLiteConversations(path).open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x" * 3000} for _ in range(20)])
        kept = conversation.messages
    whole, outcomes = path.read_bytes(), set[str]()
    for step in range(40):
        other = tmp_path / f"{step}.db"
        if step % 2:
            other.write_bytes(whole[: len(whole) * step // 40])
        else:
            place, changed = len(whole) * step // 40, bytearray(whole)
            changed[place : place + 64] = bytes(each ^ 0xFF for each in changed[place : place + 64])
            other.write_bytes(changed)
        try:
            async with SQLiteConversations(other).open("trip") as conversation:
                outcomes.add("kept" if conversation.messages == kept else "other")
        except StoreError:
            outcomes.add("error")
    assert outcomes <= {"kept", "error", "other"}
    assert "error" in outcomes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit of its own needs a process of its own")
def test_a_full_disk_is_a_typed_error_and_nothing_is_lost(tmp_path: Path):
    path = tmp_path / "talks.db"
    code = f"""
import anyio, resource, signal, sys
from fractal import StoreUnavailable
from fractal.durable import SQLiteConversations
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    async with SQLiteConversations({str(path)!r}).open("trip") as conversation:
        await conversation.append([{{"role": "user", "content": "x"}}])
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            await conversation.append([{{"role": "user", "content": "y" * 1_000_000}}])
        except StoreUnavailable as error:
            print(error.reason)
        print(len(conversation.messages))
anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    reason, length = done.stdout.splitlines()
    assert reason in ("disk I/O error", "database or disk is full")
    assert length == "1"
    assert len(anyio.run(messages_in, SQLiteConversations(path), "trip")) == 1


async def test_a_file_that_others_hold_is_waited_for_only_so_long(tmp_path: Path):
    path = tmp_path / "talks.db"
    async with SQLiteConversations(path, patience=0.3).open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="others write"):
                await conversation.append([{"role": "user", "content": "y"}])
            with anyio.move_on_after(0.1) as scope, anyio.CancelScope():
                await SQLiteConversations(path, patience=1000).delete("trip")
            assert scope.cancelled_caught
            other.execute("ROLLBACK")
        await conversation.append([{"role": "user", "content": "y"}])
    assert len(await messages_in(SQLiteConversations(path), "trip")) == 2


async def test_one_that_lets_go_in_time_is_waited_for(tmp_path: Path):
    path = tmp_path / "talks.db"
    async with SQLiteConversations(path, patience=30).open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            timer = threading.Timer(0.4, lambda: other.execute("ROLLBACK"))
            timer.start()
            await conversation.append([{"role": "user", "content": "y"}])
            await in_thread(timer.join)


# ---- the end of the process


KILLED = """
import os, signal, sys
import anyio
from fractal import BaseAgent, tool
from fractal.durable import SQLiteConversations, conversations_sqlite
from fractal.testing import ScriptedModel, answers

rows, point = conversations_sqlite._SQLiteRows, 0

def killing(original):
    def execute(self, statement, values=()):
        global point
        for is_after in (False, True):
            if is_after:
                done = original(self, statement, values)
            point += 1
            if point == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return done
    return execute

rows.execute, rows.execute_many = killing(rows.execute), killing(rows.execute_many)

@tool
async def look(n: int) -> int:
    '''Look.'''
    return n

async def main(path, backend):
    one, two, three = (answers.call("look", {"n": n}) for n in (1, 2, 3))
    script = [[one, two], [three], "done", "more"]
    agent = BaseAgent("Talker", "You talk.", client=ScriptedModel(script)).add_tool(look)
    async with SQLiteConversations(path).open("trip") as conversation:
        await agent.run("one", conversation=conversation)
        await agent.run("two", conversation=conversation)

folder, backend, step = sys.argv[1:]
for last in range(1, 1000, int(step)):
    path = os.path.join(folder, f"{last}.db")
    if os.fork() == 0:
        anyio.run(main, path, backend, backend=backend)
        os._exit(0)
    if os.wait()[1] == 0:
        break
print(last)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process for each moment")
def test_whenever_the_process_is_killed_there_is_a_history_to_go_on_with(tmp_path: Path, backend: str):
    step = 1 if backend == "asyncio" else 7  # the store does not know on which loop it is
    command = [sys.executable, "-c", KILLED, str(tmp_path), backend, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 80

    async def look_at_all() -> list[list[str]]:
        found: list[list[str]] = []
        for point in range(1, last + 1, step):
            async with SQLiteConversations(tmp_path / f"{point}.db").open("trip") as conversation:
                found.append(roles(conversation.messages))
                assert (await talker("on").run("and now?", conversation=conversation)).success
                check_messages(conversation.messages)
        return found

    found = anyio.run(look_at_all)
    first = ["user", "assistant", "tool", "tool"]
    second, third = [*first, "assistant", "tool"], [*first, "assistant", "tool", "assistant"]
    states = [[], first, second, third, [*third, "user", "assistant"]]
    numbers = [states.index(each) for each in found]
    assert numbers == sorted(numbers), "what was kept is kept later, too"
    assert {*numbers} == {*range(5)}


WRITER = """
import sys
import anyio
from fractal import ConversationConflict
from fractal.durable import PostgresConversations, SQLiteConversations

async def main(kind, where, name):
    store = SQLiteConversations(where, patience=60) if kind == "sqlite" else PostgresConversations(where, patience=60)
    async with store.open("log") as conversation:
        for number in range(20):
            while True:
                try:
                    await conversation.append([{"role": "user", "content": f"{name}{number}"}])
                    break
                except ConversationConflict:
                    await conversation.reload()

anyio.run(main, *sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_processes_that_write_at_once_lose_nothing(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    where = str(tmp_path / "talks.db") if kind == "sqlite" else request.getfixturevalue("server")
    commands = [[sys.executable, "-c", WRITER, kind, where, name] for name in "abc"]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(timeout=50) for process in processes] == [0, 0, 0]
    store = SQLiteConversations(where) if kind == "sqlite" else PostgresConversations(where)
    said = [message["content"] for message in anyio.run(messages_in, store, "log")]
    assert sorted(said) == sorted(f"{name}{number}" for name in "abc" for number in range(20))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
async def test_a_forked_child_has_a_connection_of_its_own(tmp_path: Path):
    store = SQLiteConversations(tmp_path / "talks.db")
    async with store.open("trip") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
        rows: Any = conversation._rows
        assert not rows.is_lost
        rows._process = -1
        await conversation.append([{"role": "user", "content": "y"}])
        assert conversation._rows is not rows
        rows._process = os.getpid()
        rows.close()
    assert len(await messages_in(store, "trip")) == 2


# ---- durable runs


def snapshots_of(tmp_path: Path, journal: MemoryJournal, backend: Any) -> list[tuple[dict[str, Any], Path]]:
    """What would be left if the process had ended at each moment: before and after each record, and each commit."""
    left: list[tuple[dict[str, Any], Path]] = []
    source = tmp_path / "talks.db"

    def look() -> None:
        copy = tmp_path / f"left {len(left)}.db"
        for suffix in ("", "-wal"):
            if (file := Path(f"{source}{suffix}")).exists():
                shutil.copy(file, f"{copy}{suffix}")
        left.append((deepcopy(journal.runs), copy))

    return_to = memory._OpenInMemory.record, conversations_sqlite._SQLiteRows.append

    async def record(self: Any, key: Any, text: str) -> None:
        look()
        await return_to[0](self, key, text)
        look()

    def append(self: Any, *arguments: Any) -> Any:
        look()
        head = return_to[1](self, *arguments)
        look()
        return head

    async def scenario() -> None:
        async with SQLiteConversations(source).open("trip") as conversation:
            await talker("hello").run("hi", conversation=conversation)
            await durable_talker().run("go", conversation=conversation, journal=journal, run_id="one")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory._OpenInMemory, "record", record)
        patch.setattr(conversations_sqlite._SQLiteRows, "append", append)
        anyio.run(scenario, backend=backend)
    return left


def durable_talker() -> BaseAgent:
    script = {0: [answers.call("look", {"n": n}, id=f"c{n}") for n in (1, 2)], 2: a_call(3), 3: "done"}
    model = ScriptedModel(lambda request: script[sum(each["role"] == "tool" for each in request.messages)])
    return BaseAgent("Talker", "You talk.", client=model).add_tool(look)


def test_a_durable_run_goes_on_with_its_conversation_wherever_its_process_ended(tmp_path: Path, backend: str):
    left = snapshots_of(tmp_path, MemoryJournal(), backend)
    assert len(left) > 20

    async def go_on(runs: dict[str, Any], path: Path) -> None:
        journal, store = MemoryJournal(), SQLiteConversations(path)
        journal.runs = runs
        async with store.open("trip") as conversation:
            if not conversation.messages:
                await talker("hello").run("hi", conversation=conversation)
            before = conversation.messages[:2]
            for _ in range(2):  # once it has ended, the call gives its result, and says nothing again
                result = await durable_talker().run("go", conversation=conversation, journal=journal, run_id="one")
                assert result.success
                assert result.messages[:2] == before
                assert conversation.messages == result.messages
            assert await messages_in(store, "trip") == result.messages
            check_messages(result.messages)
            # A call that was at work when the process ended has another result, and no more.
            assert roles(result.messages) == [*roles(before), *roles(EVERYTHING)]

    async def go_on_from_all() -> None:
        for runs, path in left:
            await go_on(runs, path)

    anyio.run(go_on_from_all, backend=backend)


EVERYTHING = [{"role": role} for role in ("user", "assistant", "tool", "tool", "assistant", "tool", "assistant")]


async def test_a_run_that_waited_for_an_approval_is_resumed_with_its_conversation(tmp_path: Path):
    store, journal = SQLiteConversations(tmp_path / "talks.db"), MemoryJournal()

    @tool(requires_approval=True)
    async def pay() -> str:
        """Pay."""
        return "paid"

    script = ["hello", a_call(), answers.calls(answers.call("pay", {}, id="p")), "done"]
    agent = talker(*script, approve=lambda call: Defer()).add_tool(pay)
    async with store.open("trip") as conversation:
        await agent.run("hi", conversation=conversation)
        waits = await agent.run("go", conversation=conversation, journal=journal, run_id="one")
    async with store.open("trip") as conversation:
        answer: Any = {call.call_id: True for call in waits.pending}
        with pytest.raises(InvalidArguments, match="conversation="):
            await agent.resume(journal, "one", answer, conversation=cast("Any", "trip"))  # which answers nothing
        result = await agent.resume(journal, "one", answer, conversation=conversation)
        assert (result.content, conversation.messages) == ("done", result.messages)
    async with store.open("trip") as conversation:
        assert conversation.messages == result.messages


async def test_a_durable_run_that_was_cancelled_goes_on_with_its_conversation(tmp_path: Path):
    store, journal, begun = SQLiteConversations(tmp_path / "talks.db"), MemoryJournal(), anyio.Event()

    @tool(idempotent=True)
    async def slow() -> str:
        """Take a while."""
        if not begun.is_set():
            begun.set()
            await anyio.sleep_forever()
        return "slow"

    agent = talker(answers.calls(answers.call("slow", {}, id="s")), "done").add_tool(slow)
    async with store.open("trip") as conversation:
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                await agent.run("go", conversation=conversation, journal=journal, run_id="one")

            group.start_soon(ask)
            await begun.wait()
            group.cancel_scope.cancel()
        assert conversation.messages == []
        result = await agent.run("go", conversation=conversation, journal=journal, run_id="one")
        assert [each["content"] for each in conversation.messages] == ["go", None, "slow", "done"]
        assert conversation.messages == result.messages


async def test_a_durable_run_does_not_go_on_after_what_others_have_said_since(tmp_path: Path):
    store, journal = SQLiteConversations(tmp_path / "talks.db"), MemoryJournal()
    async with store.open("trip") as conversation:
        with pytest.raises(ConversationConflict):
            agent = talker(a_call(), answers.calls(answers.call("elsewhere", {}, id="e")))
            await agent.add_tool(partial(go_on_elsewhere, store), name="elsewhere").run(
                "go", conversation=conversation, journal=journal, run_id="one"
            )
        await conversation.reload()
        with pytest.raises(ConversationConflict):
            await talker("done").run("go", conversation=conversation, journal=journal, run_id="one")
        assert roles(conversation.messages) == ["user", "assistant", "tool", "user"]


# ---- PostgreSQL


async def test_a_server_that_ends_a_connection_is_told_and_connected_to_again(server: str):
    import psycopg

    store = PostgresConversations(server)
    async with store.open("lost") as conversation:
        await conversation.append([{"role": "user", "content": "x"}])
        with psycopg.connect(server, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fractal'")
        with pytest.raises(StoreUnavailable):
            await conversation.append([{"role": "user", "content": "y"}])
        await conversation.append([{"role": "user", "content": "z"}])
    assert [m["content"] for m in await messages_in(store, "lost")] == ["x", "z"]
    await store.delete("lost")


async def test_tables_of_a_newer_version_are_refused(server: str):
    import psycopg

    store = PostgresConversations(server)
    await store.list()
    with psycopg.connect(server, autocommit=True) as other:
        other.execute("UPDATE fractal_conversations_version SET version = 2")
        try:
            with pytest.raises(StoreUnreadable, match="version"):
                await store.list()
        finally:
            other.execute("UPDATE fractal_conversations_version SET version = 1")


async def test_a_server_that_is_away_is_a_typed_error_without_the_password(tmp_path: Path):
    pytest.importorskip("psycopg")
    store = PostgresConversations(f"postgresql://me:hunter2@/db?host={tmp_path}")
    with pytest.raises(StoreUnavailable) as caught:
        await store.list()
    assert "hunter2" not in str(caught.value) + repr(store)
    with pytest.raises(InvalidArguments) as refused:
        PostgresConversations("postgresql://me:hunter2@host:port:port/x%%")
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__
