"""Guards: functions that look at a run while its model is asked first, and stop it if they raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from fractal._concurrency.background import Unstarted
from fractal._concurrency.scopes import ENDS_A_LOOP, raising
from fractal._engine.explain import explain
from fractal._engine.hooks import call_user
from fractal._texts import is_a, name_of, one_line, repr_of
from fractal.errors import GuardRaised, InvalidArguments, ToolIgnoredCancellation, UserError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fractal._engine.run import Run
    from fractal.around import Guard
    from fractal.model import Reply

__all__ = ["ask_guarded"]


async def ask_guarded(run: Run, guards: Sequence[Guard], ask: Callable[[Run], Awaitable[Reply]]) -> Reply:
    """Ask the model while guards look on; the reply is given out when all of them have let it pass.

    Args:
        run: The run.
        guards: Who looks on, side by side.
        ask: Asks the model.

    Raises:
        GuardRaised: One of them stops the run; what goes on beside it was cancelled.
        Exception: What asking raises.
    """
    failures: list[BaseException] = []
    replies: list[Reply] = []
    left, over = len(guards), anyio.Event()

    async def look(guard: Guard) -> None:
        nonlocal left
        try:
            await _look(run, guard)
        except (Exception, *ENDS_A_LOOP) as error:
            failures.append(error)
            group.cancel_scope.cancel()
        left -= 1
        if not left:
            over.set()

    with raising(failures):
        async with anyio.create_task_group() as group:
            for guard in guards:
                group.start_soon(Unstarted, look, guard, name="fractal guard")
            try:
                replies.append(await ask(run))
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()
            with run.clock.waiting("its guards"):
                await over.wait()
    return replies[0]


async def _look(run: Run, guard: Guard) -> None:
    """Have a guard look.

    Raises:
        GuardRaised: It stops the run.
        InvalidArguments: It returned something that says neither yes nor no.
    """
    name = name_of(guard)
    try:
        verdict = await call_user(run.emitter.warn, guard, run.hook_context())
    except Exception as error:
        if is_a(error, (UserError, ToolIgnoredCancellation)):
            raise
        raise GuardRaised(name, explain(error)) from error
    if verdict is False:
        raise GuardRaised(name, "it returned False")
    if verdict is not None and verdict is not True:
        raise InvalidArguments(
            f"guard {name!r} returned {one_line(repr_of(verdict), 100)}: a guard raises, or returns False, to stop the"
            " run, and returns None or True to let it go on"
        )
