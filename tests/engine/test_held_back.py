"""What a stream shows of runs whose answer the agent's own `run` has still to let out."""

from __future__ import annotations

import anyio

from fractal._concurrency.feed import Feed
from fractal._engine.held_back import HeldBack
from fractal.events import Event, TextDelta
from tests.support import in_thread


def delta(run_id: str, text: str) -> TextDelta:
    return TextDelta(run_id=run_id, parent_id=None, agent_name="A", depth=0, text=text)


async def test_text_of_the_agents_own_runs_is_held_back_and_that_of_others_is_not():
    feed: Feed[Event] = Feed(8)
    held = HeldBack(feed, lambda run_id: run_id == "own")
    held.put(delta("own", "secret"))
    held.put(delta("below", "shown"))
    assert [event.text for event in await feed.take() if isinstance(event, TextDelta)] == ["shown"]


async def test_another_event_loop_writes_to_the_feed_itself():
    feed: Feed[Event] = Feed(8)
    inlet = HeldBack(feed, lambda run_id: True).for_other_loop()
    await in_thread(inlet.put, delta("below", "shown"))
    with anyio.fail_after(10):
        assert isinstance(await feed.next(), TextDelta)
