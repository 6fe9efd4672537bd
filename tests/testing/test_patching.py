"""Functions of other libraries, replaced and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fractal.testing import block_real_requests, virtual_time
from fractal.testing._patching import Patch


class Above:
    def say(self, word: str) -> str:
        return word


class Owner(Above):
    def shout(self, word: str) -> str:
        return word.upper()


def marked(original: Callable[..., str], *arguments: Any) -> str:
    return f"ours {original(*arguments)}"


@pytest.mark.parametrize("name", ["say", "shout"])
def test_a_function_is_replaced_until_the_end_of_the_last_block(name: str):
    before = dict(vars(Owner))
    patch, call = Patch(Owner, name, marked), lambda: getattr(Owner(), name)("X")
    for _ in range(2):
        with patch:
            with patch:
                assert call() == "ours X"
            assert call() == "ours X"
        assert call() == "X"
        assert dict(vars(Owner)) == before


def test_what_somebody_else_has_put_over_it_stays(monkeypatch: pytest.MonkeyPatch):
    patch = Patch(Owner, "shout", marked)
    with monkeypatch.context() as others:
        with patch:
            ours: Any = Owner.shout
            others.setattr(Owner, "shout", lambda self, word: f"theirs {ours(self, word)}")
        assert Owner().shout("x") == "theirs ours X"
    assert Owner().shout("x") == "ours X"  # as they have given it back
    with patch:
        assert Owner().shout("x") == "ours X"
    assert Owner().shout("x") == "X"


def test_what_somebody_else_has_taken_away_is_put_again(monkeypatch: pytest.MonkeyPatch):
    patch = Patch(Owner, "shout", marked)
    others = pytest.MonkeyPatch()
    others.setattr(Owner, "shout", lambda self, word: "theirs")
    with patch:
        assert Owner().shout("x") == "ours theirs"
        others.undo()
    assert Owner().shout("x") == "X"
    with patch:
        assert Owner().shout("x") == "ours X"
    assert Owner().shout("x") == "X"


def test_tools_for_tests_leave_other_libraries_as_they_were():
    import aiohttp
    import httpx
    import httpx2
    import trio._threads

    from fractal.models._http.connections import Connections

    def now() -> list[Any]:
        return [
            Connections.send,
            httpx.HTTPTransport.handle_request,
            httpx2.AsyncHTTPTransport.handle_async_request,
            aiohttp.TCPConnector.connect,
            trio._threads.start_thread_soon,
        ]

    async def nothing() -> None:
        assert now()[-1] is not before[-1]

    before = now()
    with block_real_requests():
        assert all(one is not other for one, other in zip(now()[:-1], before[:-1], strict=True))
    virtual_time().run(nothing)
    assert now() == before
