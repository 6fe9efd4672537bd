"""Runs whose conversation is kept: each time it is whole, what is new goes to a store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import anyio

from fractal._concurrency.scopes import is_cancellation
from fractal._texts import said_by
from fractal.errors import ApprovalPending, StoreError

if TYPE_CHECKING:
    from fractal._engine.keeper import Keeper
    from fractal._engine.run import Run

__all__ = ["keep", "kept"]

T = TypeVar("T")


async def kept(run: Run, keeper: Keeper, work: Callable[[Run], Awaitable[T]]) -> T:
    """Do the work of a run, and keep what comes of it, whether it succeeds or not.

    Raises:
        StoreError: It cannot be kept.
        BaseException: What the work raises.
    """
    await keeper.begin()
    try:
        end = await work(run)
    except StoreError:
        raise
    except BaseException as error:
        was_cancelled = is_cancellation(error)
        goes_on = isinstance(error, ApprovalPending) or (was_cancelled and not run.clock.is_out_of_time())
        if run.journaled is None or not goes_on:  # what a durable run says next follows what is in its journal
            await _keep_rest(run, keeper, was_cancelled=was_cancelled)
        raise
    await keep(run, keeper)
    return end


async def keep(run: Run, keeper: Keeper) -> None:
    """Keep the new messages of a conversation that is whole; a question is kept with what it has led to.

    Raises:
        StoreError: It cannot be kept.
    """
    has_led_to_something = len(run.transcript) > len(keeper.history) + 1
    if has_led_to_something and len(run.transcript) > keeper.position:
        await keeper.keep(run.transcript.since(keeper.position))


async def _keep_rest(run: Run, keeper: Keeper, *, was_cancelled: bool) -> None:
    """Keep the messages of a run that failed or was cancelled; a cancellation goes before an error of the store."""
    try:
        with anyio.move_on_after(run.grace, shield=True) as scope:
            await keep(run, keeper)
        if scope.cancelled_caught:
            run.emitter.warn(f"what was said is not kept: the store did not answer within {run.grace:g} s")
    except StoreError as error:
        if not was_cancelled:
            raise
        run.emitter.warn(f"what was said is not kept: {said_by(error)}")
