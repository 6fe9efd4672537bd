"""`fractal chat --conversation ID`: it goes on where it was, whatever ended it."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from fractal.cli.main import main
from fractal.durable import SQLiteConversations
from fractal.testing import Endpoint
from tests.cli.test_chat import (
    Chat,
    Terminal,
    chat as chat,
    endpoint as endpoint,
    project as project,
    told_by_users,
)
from tests.databases import postgres

KEPT = ("--conversation", "trip", "--store", "talks.db")


def contents(path: str, one: str = "trip") -> list[str]:
    exported = anyio.run(SQLiteConversations(path).export, one)
    return [message["content"] for message in exported["messages"] if message["content"]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as conninfo:
        yield conninfo


@pytest.mark.parametrize("agent", ["Ready", "Blocking"])
def test_a_conversation_goes_on_where_it_was(agent: str, chat: Chat, endpoint: Endpoint, backend: str):
    options = ("--backend", backend, *KEPT)
    assert chat("one\n", *options, agent=agent) == (0, "heard one well\n", "")
    assert chat("two\nbad\n", *options, agent=agent)[0] == 1
    assert chat("three\n", *options, agent=agent)[0] == 0
    assert told_by_users(endpoint) == ["one", "two", "three"]
    said = ["one", "heard one well", "two", "heard two well", "three", "heard three well"]
    assert contents("talks.db") == said


def test_another_one_is_another_one(chat: Chat, endpoint: Endpoint):
    assert chat("one\n", *KEPT)[0] == 0
    assert chat("two\n", "--conversation", "../other", "--store", "talks.db")[0] == 0
    assert told_by_users(endpoint) == ["two"]
    assert [each.id for each in anyio.run(SQLiteConversations("talks.db").list)] == ["../other", "trip"]


def test_without_a_store_there_is_a_file_of_the_users_own(
    chat: Chat, endpoint: Endpoint, project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(project / "data"))
    assert chat("one\n", "--conversation", "trip")[0] == 0
    file = project / "data" / "fractal" / "conversations.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("FRACTAL_CONVERSATIONS", str(file))
    monkeypatch.setenv("XDG_DATA_HOME", "/dev/null/no")
    assert chat("two\n", "--conversation", "trip")[0] == 0
    assert told_by_users(endpoint) == ["one", "two"]
    monkeypatch.delenv("FRACTAL_CONVERSATIONS")
    status, _, told = chat("two\n", "--conversation", "trip")
    assert status == 2
    assert "name a file with --store" in told


def test_it_may_be_kept_in_postgresql(chat: Chat, endpoint: Endpoint, server: str):
    for line in ("one\n", "two\n"):
        assert chat(line, "--conversation", "trip", "--store", server)[0] == 0
    assert told_by_users(endpoint) == ["one", "two"]


def test_what_cannot_be_is_told_at_once(chat: Chat, project: Path):
    pytest.importorskip("psycopg")
    (project / "no.db").write_text("this is no database" * 100, encoding="utf-8")
    for options, words in {
        ("--store", "talks.db"): "name it with --conversation",
        ("--conversation", "a\nb"): "without control characters",
        ("--conversation", "trip", "--store", "no.db"): "file is not a database",
        ("--conversation", "trip", "--store", "no/talks.db"): "No such file or directory",
        ("--conversation", "trip", "--store", "postgresql://me:hunter2@host/x%%"): "give what psycopg takes",
    }.items():
        status, out, told = chat("one\n", *options)
        assert (status, out) == (2, "")
        assert words in told
        assert "hunter2" not in told
    with pytest.raises(SystemExit):
        main(["chat", "--conversation", "trip", "--continue", "x.json"])


def test_one_that_somebody_else_has_gone_on_with_is_read_again(chat: Chat, endpoint: Endpoint, monkeypatch):
    original, others = SQLiteConversations.open, []

    def open_and_disturb(self, one):
        conversation = original(self, one)
        reload = conversation.reload

        async def disturbed():
            await reload()
            if not others:
                others.append(one)
                async with original(self, one) as other:
                    await other.append([{"role": "user", "content": "from elsewhere"}])

        conversation.reload = disturbed
        return conversation

    monkeypatch.setattr(SQLiteConversations, "open", open_and_disturb)
    status, out, told = chat("one\ntwo\n", *KEPT)
    assert (status, out) == (0, "heard two well\n")
    assert "somebody else has gone on with the conversation, which has 1 message now; ask again" in told
    assert told_by_users(endpoint) == ["from elsewhere", "two"]
    assert contents("talks.db") == ["from elsewhere", "two", "heard two well"]


def test_a_store_that_fails_is_told_and_the_next_line_is_another_try(chat: Chat, endpoint: Endpoint, monkeypatch):
    from fractal.durable.conversations_sqlite import _SQLiteRows

    original, failures = _SQLiteRows.execute_many, ["disk I/O error"]

    def failing(self, statement, values):
        if failures:
            raise sqlite3.OperationalError(failures.pop())
        original(self, statement, values)

    monkeypatch.setattr(_SQLiteRows, "execute_many", failing)
    status, out, told = chat("one\ntwo\n", *KEPT)
    assert (status, out) == (0, "heard two well\n")
    assert "disk I/O error" in told
    assert contents("talks.db") == ["two", "heard two well"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
class TestInATerminal:
    def test_what_was_said_is_told_and_other_conversations_are_refused(self, project: Path, endpoint: Endpoint):
        with Terminal(*KEPT) as terminal:
            terminal.says("one", "heard one well", "\n> ")  # which comes once it is kept
        with Terminal(*KEPT) as terminal:
            terminal.wait_for("the conversation goes on: 2 messages")
            for line in ("/new", "/load x.json"):
                terminal.says(line, "this conversation is kept")
            terminal.says("two", "heard two well")
        assert told_by_users(endpoint) == ["one", "two"]

    def test_a_program_that_is_killed_loses_nothing_that_was_said(self, project: Path, endpoint: Endpoint):
        with Terminal(*KEPT) as terminal:
            terminal.says("one", "heard one well", "\n> ")
            terminal.type("hang\n")
            terminal.pause(0.3)
            os.kill(terminal._process.pid, 9)
            terminal._process.wait()
        assert contents("talks.db") == ["one", "heard one well"]
        with closing(sqlite3.connect("talks.db")) as file:
            assert [*file.execute("PRAGMA integrity_check")] == [("ok",)]
