"""What runs and calls have to be for those who record and keep them."""

from __future__ import annotations

import pytest
from typing_extensions import get_protocol_members

from fractal._engine.call import Call
from fractal._engine.journal_parties import CallParty, RunParty
from fractal._engine.keeper import Keeper, Kept
from fractal._engine.run import Run
from fractal.durable.conversations import Conversation, _Turn


@pytest.mark.parametrize(
    ("party", "kind"), [(RunParty, Run), (CallParty, Call), (Keeper, _Turn), (Kept, Conversation)], ids=str
)
def test_what_records_needs_is_there(party: type, kind: type):
    there = {name for each in kind.__mro__ for name in (*vars(each), *getattr(each, "__annotations__", {}))}
    made_at_once = {"history", "position"} if kind is _Turn else set[str]()
    assert get_protocol_members(party) - there - made_at_once == set()
