"""The loop: ask the model, see what it wants, call the tools, again. There is no other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anyio

from fractal._ask import ask
from fractal._calls import answer_calls
from fractal._scopes import cancellation_was_meant, leaves, move_on_after, single_error
from fractal._step import AskAgain, CallTools, Decline, Finish, next_step
from fractal.errors import (
    DeadlineExceeded,
    IterationsExceeded,
    NoContent,
    Refused,
    RunCancelled,
    RunError,
    StopReason,
    UnexpectedError,
    UserError,
)

if TYPE_CHECKING:
    from fractal._run import Run
    from fractal.results import AgentResult

__all__ = ["drive"]

logger = logging.getLogger("fractal")


async def drive(run: Run) -> AgentResult:
    """Take a run from its first event to its last, in the caller's task.

    Returns:
        How it ended. Failures of the run are in the result, as is the end of its own time.

    Raises:
        UserError: The package was used in a way that cannot work.
        BaseException: Cancellation from outside, after the cleanup; the run's last event has the partial result.
    """
    timeout = run.timeout()
    with single_error():
        try:
            with move_on_after(timeout), run.entered():
                return run.succeed(*await _converse(run))
        except RunError as error:
            return run.fail(error)
        except UserError as error:
            run.fail(_unexpected(error))
            raise
        except Exception as error:
            logger.debug("run %s failed", run.run_id, exc_info=True)
            return run.fail(_unexpected(error))
        except BaseException as error:
            if _is_cancellation(error) and not cancellation_was_meant():
                return run.fail(_unexpected(error))  # something the model awaited was cancelled, and not this run
            run.fail(_why_cancelled(run) if _is_cancellation(error) else _unexpected(error))
            raise
    # Nothing was returned or raised, so the scope above has caught its own deadline.
    assert timeout is not None
    return run.fail(DeadlineExceeded(timeout))


async def _converse(run: Run) -> tuple[Any, StopReason]:
    run.system = await run.settings.system_prompt(run.context())
    while True:
        _next_iteration(run)
        closing = run.is_closing()
        reply = await ask(run)
        match next_step(reply, run.tools):
            case CallTools(calls):
                run.transcript.append(reply.message())
                for result in await answer_calls(run, calls):
                    if result.outcome == "ok" and run.tools[result.tool_name].options.terminate:
                        return result.content, "terminated"
            case Finish(content):
                run.transcript.append(reply.message())
                if reply.finish_reason == "length":
                    run.warn("the answer was cut at the token limit: raise max_tokens to get all of it")
                return content, "soft_deadline" if closing else "finished"
            case Decline(reason):
                run.transcript.append({"role": "assistant", "content": reply.text or reason})
                raise Refused(reason)
            case AskAgain():
                run.iterations -= 1  # an empty reply is not a turn
                run.empty_replies += 1
                if run.empty_replies > run.settings.max_retries:
                    raise NoContent(run.empty_replies)


def _next_iteration(run: Run) -> None:
    limit = run.limits.max_iterations
    if limit is not None and run.iterations >= limit:
        raise IterationsExceeded(int(limit))
    run.iterations += 1


def _why_cancelled(run: Run) -> RunError:
    # The deadline of a run above is the reason here too, though that run's scope has caused the cancellation.
    return DeadlineExceeded(anyio.current_time() - run.started) if run.is_out_of_time() else RunCancelled()


def _unexpected(error: BaseException) -> UnexpectedError:
    errors = leaves(error)
    error = errors[0] if len(errors) == 1 else error
    wrapped = UnexpectedError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _is_cancellation(error: BaseException) -> bool:
    cancelled = anyio.get_cancelled_exc_class()
    return all(isinstance(leaf, cancelled) for leaf in leaves(error))
