"""The tools that shuffle: that they do, that a seed repeats it, and that time jumps."""

from __future__ import annotations

import anyio
import pytest

from tests.schedules import run_shuffled

HOUR = 3600.0


def order(backend: str, seed: int, *, virtual: bool = False) -> list[int]:
    """In which order four tasks come to each of their steps."""
    seen: list[int] = []

    async def take_steps(number: int) -> None:
        for _ in range(3):
            seen.append(number)
            await anyio.sleep(HOUR if virtual else 0)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(take_steps, number)

    run_shuffled(main, backend=backend, seed=seed, virtual=virtual)
    return seen


@pytest.mark.parametrize("virtual", [True, False])
def test_tasks_take_turns_in_an_order_that_the_seed_decides(backend: str, virtual: bool):
    orders = {seed: order(backend, seed, virtual=virtual) for seed in range(5)}
    assert len({tuple(each) for each in orders.values()}) > 1
    assert order(backend, 3, virtual=virtual) == orders[3]
    assert all(each[:4] != each[4:8] or each[4:8] != each[8:] for each in orders.values()), "each turn has its own"


def test_virtual_time_passes_when_all_tasks_wait(backend: str):
    async def main() -> float:
        started = anyio.current_time()
        with anyio.move_on_after(HOUR):
            await anyio.sleep_forever()
        await anyio.sleep(HOUR)
        return anyio.current_time() - started

    assert run_shuffled(main, backend=backend, seed=1, virtual=True) == pytest.approx(2 * HOUR)


def test_virtual_time_on_asyncio_says_when_nothing_will_ever_happen():
    async def main() -> None:
        await anyio.Event().wait()

    with pytest.raises(RuntimeError, match="every task waits"):
        run_shuffled(main, backend="asyncio", seed=1, virtual=True)


def test_each_step_of_a_task_is_told(backend: str):
    told: list[None] = []

    async def main() -> None:
        for _ in range(10):
            await anyio.sleep(0)

    run_shuffled(main, backend=backend, seed=1, step=lambda: told.append(None))
    assert len(told) > 10
