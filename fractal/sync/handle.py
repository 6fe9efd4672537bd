"""A run that goes on while its starter does something else."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, Self, overload

from typing_extensions import TypeForm, Unpack

from fractal._agent import verbs
from fractal._concurrency.current import current_run
from fractal._concurrency.threads import refuse_abandoned
from fractal._engine.overrides import Adoption, adopting
from fractal._texts import described
from fractal.errors import RunCancelled
from fractal.options import PlainOptions, RunOptions
from fractal.results import AgentResult, Content, Content_co
from fractal.sync._portal import PortalCall, here, thread_of_a_run

if TYPE_CHECKING:
    from fractal._engine.run import Run
    from fractal.definition import AgentDefinition

__all__ = ["Handle", "start"]


class _Started:
    """A run that is made once there is an event loop for it."""

    def __init__(self, agent: AgentDefinition[Any], user_input: object, options: RunOptions) -> None:
        self._agent, self._input, self._options = agent, user_input, options
        self.run: Run | None = None

    async def go(self) -> AgentResult[Any]:
        """Make the run, and take it to its end."""
        adopting.set(Adoption(self._agent, current_run.get(), self._take))
        return await verbs.ask(self._agent, self._input, **self._options)

    def _take(self, run: Run) -> None:
        self.run = run


class Handle(Generic[Content_co]):
    """A run that goes on while its starter does something else; made by `start`, usable from any thread."""

    _call: PortalCall[AgentResult[Content_co]]
    _is_given_out = False

    def __init__(
        self,
        agent: AgentDefinition[Any],
        user_input: object,
        **options: Unpack[RunOptions],
    ) -> None:
        refuse_abandoned()
        self._started = _Started(agent, user_input, options)
        self._call = PortalCall(self._started.go, here())
        self._call.start()

    def give_out(self) -> Self:
        """Hand the run over to its starter: if the handle is dropped from now on, the run goes on."""
        self._is_given_out = True
        return self

    def __del__(self) -> None:
        if not self._is_given_out and hasattr(self, "_call"):  # Ctrl-C has come first, and nobody has the handle
            self._call.cancel_from_thread()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: the run {'has ended' if self.done() else 'goes on'}>"

    def _repr_html_(self) -> str:
        from fractal._html import card, line, of_result

        result: AgentResult[Content_co] | None = None
        if self.done():
            try:
                result = self.result(0)
            except RunCancelled as error:
                result = error.result
            except Exception as error:  # the run could not be carried out
                return card(line(repr(self)), line(described(error)))
        return card(line(repr(self)), of_result(result) if result is not None else "")

    def cancel(self) -> None:
        """Cancel the run; returns at once, `result` then tells when its cleanup is done."""
        self._call.cancel_from_thread()

    def done(self) -> bool:
        """Whether the run has ended, cleanup included."""
        return self._call.wait(0)

    def result(self, timeout: float | None = None) -> AgentResult[Content_co]:
        """Wait for the run.

        Args:
            timeout: Seconds to wait; None: as long as it takes. The run itself goes on when they are over.

        Returns:
            How the run ended.

        Raises:
            TimeoutError: It has not ended within `timeout`.
            RunCancelled: It was cancelled; the error's `result` has what it had done.
        """
        thread_call = thread_of_a_run()
        with thread_call.lent() if thread_call is not None else nullcontext():
            has_ended = self._call.wait(timeout)
        if not has_ended:
            raise TimeoutError(f"the run has not ended within {timeout:g} s; it goes on: ask again, or cancel() it")
        try:
            return self._call.result()
        except RunCancelled as error:
            error.result = self._started.run.result if self._started.run else None
            raise


@overload
def start(
    agent: AgentDefinition[Content],
    user_input: object,
    *,
    output_type: None = None,
    **options: Unpack[PlainOptions],
) -> Handle[Content]: ...


@overload
def start(
    agent: AgentDefinition[Any],
    user_input: object,
    *,
    output_type: TypeForm[Content],
    **options: Unpack[PlainOptions],
) -> Handle[Content]: ...


def start(
    agent: AgentDefinition[Any],
    user_input: object,
    **options: Unpack[RunOptions],
) -> Handle[Any]:
    """Start a run and return at once.

    Args:
        agent: The agent.
        user_input: As in `BaseAgent.run`.
        **options: As `RunOptions` describes them.

    Returns:
        A handle to wait for the run or cancel it, from any thread.

    Raises:
        RunCancelled: The caller is a tool that its run has left to itself.

    Example:
        ```python
        handle = sync.start(agent, "a long story")
        handle.cancel()
        ```
    """
    return Handle(agent, user_input, **options).give_out()
