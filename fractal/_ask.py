"""One question to the model: its place in the budget, its deadline, and the only retries there are."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from fractal._scopes import move_on_after, remaining
from fractal.errors import DeadlineWouldPass, InvalidArguments, ModelError, RequestTimedOut
from fractal.events import ModelRequested, ModelResponded, RetryScheduled
from fractal.models.base import ModelRequest, Reply

if TYPE_CHECKING:
    from fractal._run import Run

__all__ = ["ask", "back_off_seconds"]

FIRST_BACK_OFF = 0.5
LONGEST_BACK_OFF = 8.0
LONGEST_RETRY_AFTER = 120.0
"""Seconds. The schedule of the `openai` SDK, which users of these endpoints know."""

_CHARACTERS_PER_TOKEN = 4  # the usual rule of thumb for English text; corrected by what the endpoint reports

_CLOSING_WORDS = "Time is nearly up. Give your final answer now, with what you know, without calling tools."


async def ask(run: Run) -> Reply:
    """Ask the run's model, again if that may help.

    Raises:
        ModelError: There is no usable answer.
        BudgetExceeded: A request, or the tokens it needs, would be over the budget.
        DeadlineWouldPass: The next try would have to wait longer than there is time.
    """
    for attempt in itertools.count(1):
        try:
            return await _send(run, _request(run), attempt)
        except ModelError as error:
            failure = error
        # A run that has been cancelled meanwhile has no time left either; that is not for us to tell.
        await checkpoint_if_cancelled()
        wait = _wait_before_next(run, failure, attempt)
        run.emit(RetryScheduled, attempt=attempt, wait=wait, error=str(failure))
        await anyio.sleep(wait)
    raise AssertionError("unreachable")


def back_off_seconds(attempt: int) -> float:
    """Seconds to wait after so many failed tries: 0.5, 1, 2, 4, then 8, less up to a quarter at random."""
    return min(FIRST_BACK_OFF * 2.0 ** min(attempt - 1, 10), LONGEST_BACK_OFF) * random.uniform(0.75, 1.0)


def _request(run: Run) -> ModelRequest:
    closing = run.is_closing()
    return ModelRequest(
        model=run.settings.model_name,
        system=run.system,
        transcript=run.transcript,
        tools=None if closing else run.tool_schemas,
        settings=run.settings.model_settings,
        instruction=_CLOSING_WORDS if closing else None,
    )


async def _send(run: Run, request: ModelRequest, attempt: int) -> Reply:
    seconds = run.limits.request_timeout
    with run.budget.reserve("tokens", _estimate(run, request)) as tokens:
        # Spent before it is sent, and never given back: a request that fails or is cut has still reached the endpoint.
        run.budget.spend("requests")
        run.emit(ModelRequested, iteration=run.iterations, attempt=attempt, message_count=len(run.transcript))
        started = anyio.current_time()
        with move_on_after(seconds) as scope:
            reply = await run.settings.model.respond(request)
            if not isinstance(reply, Reply):
                raise InvalidArguments(f"respond() of the model {run.settings.model!r} returned {reply!r}, not a Reply")
            tokens.commit(reply.input_tokens + reply.output_tokens)
            run.budget.add_tokens(reply.input_tokens, reply.output_tokens)
            run.emit(
                ModelResponded,
                message=reply.message(),
                finish_reason=reply.finish_reason,
                input_tokens=reply.input_tokens,
                output_tokens=reply.output_tokens,
                elapsed=anyio.current_time() - started,
            )
            return reply
    assert scope.cancelled_caught
    raise RequestTimedOut(f"the model did not answer within the {seconds:g} s that a request may take")


def _estimate(run: Run, request: ModelRequest) -> int:
    """Tokens to set aside: nobody counts them when no budget asks."""
    if run.budget.is_unlimited("tokens"):
        return 0
    return len(request.body()) // _CHARACTERS_PER_TOKEN + (request.settings.max_tokens or 0)


def _wait_before_next(run: Run, error: ModelError, attempt: int) -> float:
    """Seconds until the next try; raises the error if there is to be none."""
    if not error.retryable or attempt > run.settings.max_retries:
        raise error
    wait = error.retry_after if error.retry_after is not None else back_off_seconds(attempt)
    if wait > LONGEST_RETRY_AFTER:
        raise error
    left = remaining()
    if wait >= left:
        raise DeadlineWouldPass(f"after “{error}”, waiting to ask the model again", wait, left) from error
    return wait
