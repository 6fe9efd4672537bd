"""What is begun below a run: joined at its end, even what another thread notes in that moment."""

from __future__ import annotations

import anyio
from anyio.lowlevel import current_token

from fractal._concurrency.background import Joinable
from fractal._engine.below import Below


class Work(Joinable):
    """Work that ends when it is cancelled, and may have more begun then."""

    def __init__(self, below: Below, more: int = 0) -> None:
        super().__init__(current_token())
        self._below, self._more = below, more

    def cancel(self) -> None:
        if self._more and not self.has_ended:
            self._below.note(Work(self._below, self._more - 1), None, is_reached=False)
        self.end()


async def test_what_is_noted_while_the_run_ends_is_joined_too():
    below = Below()
    below.note(Work(below, more=3), None, is_reached=False)
    with anyio.fail_after(10):
        await below.end()
    assert (below.is_over, bool(below)) == (True, False)


async def test_what_is_noted_in_the_moment_in_which_the_run_is_over_is_joined_too():
    class Late(Below):
        __slots__ = ("late",)

        def __setattr__(self, name: str, value: object) -> None:
            if name == "is_over" and value and not hasattr(self, "late"):
                self.late = Work(self)
                self.note(self.late, None, is_reached=False)  # by another thread
            super().__setattr__(name, value)

    below = Late()
    with anyio.fail_after(10):
        await below.end()
    assert below.late.has_ended
    assert not below


async def test_what_is_noted_after_the_end_is_cancelled():
    below = Below()
    await below.end()
    below.note(work := Work(below), None, is_reached=False)
    assert work.has_ended
