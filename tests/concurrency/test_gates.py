"""First-come limits: whose slot it is where nobody waits for it any more."""

from __future__ import annotations

import anyio
import pytest

from fractal._concurrency.gates import Gate, _Waiter


def test_a_slot_goes_past_a_task_whose_event_loop_has_ended(backend: str):
    gate = Gate(1, "its turn")

    async def leave_one_waiting() -> None:
        gate._waiters.append(_Waiter())  # as a loop that is closed leaves it

    anyio.run(leave_one_waiting, backend=backend)
    gate.take()
    assert gate.waiting == 1
    gate.release()
    assert (gate.held, gate.waiting) == (0, 0)


@pytest.mark.parametrize("tasks", [1, 3])
async def test_a_slot_that_is_given_back_is_the_next_ones(tasks: int):
    gate, order = Gate(1, "its turn"), list[int]()

    async def enter(number: int) -> None:
        async with gate.slot():
            order.append(number)

    gate.take()
    async with anyio.create_task_group() as group:
        for number in range(tasks):
            group.start_soon(enter, number)
            await anyio.wait_all_tasks_blocked()
        gate.release()
    assert (order, gate.held) == ([*range(tasks)], 0)
