"""Users' own functions that a run calls on its way: to check an answer, approve a call, sum up what is dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import anyio

from fractal._concurrency.gates import Gate, approval_threads, hook_threads
from fractal._concurrency.grace import answered, settled
from fractal._concurrency.scopes import single_error, waiting
from fractal._concurrency.stall import timed
from fractal._concurrency.threads import ThreadCall
from fractal._functions.callables import is_async
from fractal._functions.signature import SignatureFault, read_signature
from fractal._log import log
from fractal._texts import name_of, repr_of
from fractal.context import RunContext, is_context
from fractal.errors import InvalidArguments

__all__ = ["Hook", "Warn", "call_user"]

Warn = Callable[[str], object]
"""Told what a user should know."""


class Hook:
    """A user's function, plain or async, of one value, and of the run's context if it has a parameter for that.

    The parameter for the context is the one annotated `RunContext`, or else a second one without a default.

    Args:
        function: The function.
        what: What it is for, for errors.

    Raises:
        InvalidArguments: It cannot be called so.
    """

    def __init__(self, function: Callable[..., Any], what: str) -> None:
        if not callable(function):
            raise InvalidArguments(f"{what}={repr_of(function)}: give a function")
        self.function = function
        # Whoever approves may take all the time of the world, and keeps no other hook waiting by that.
        self._threads = approval_threads if what == "approve" else hook_threads
        self._parameters, self._context_name = _parameters(function, what)

    async def __call__(self, value: object, context: RunContext[Any], warn: Warn = log.warning) -> Any:
        """Call the function where it blocks no event loop; its exceptions come out as they are."""
        positional, by_name = self.arguments(value, context)
        return await _call(warn, self.function, self._threads, positional, by_name)

    def arguments(self, value: object, context: RunContext[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the function: by position, and by name."""
        positional: list[Any] = []
        by_name: dict[str, Any] = {}
        for parameter in self._parameters:
            argument = context if parameter.name == self._context_name else value
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                positional.append(argument)
            else:
                by_name[parameter.name] = argument
        return positional, by_name


async def call_user(warn: Warn, function: Callable[..., Any], /, *arguments: object, **by_name: object) -> Any:
    """Call a user's function where it blocks no event loop: awaited if async, else in a worker thread."""
    return await _call(warn, function, hook_threads, arguments, by_name)


async def _call(
    warn: Warn, function: Callable[..., Any], threads: Gate, arguments: Sequence[object], by_name: Mapping[str, object]
) -> Any:
    answers: list[Any] = []  # a thread must not hand over a bare coroutine on trio
    name = name_of(function)

    def work() -> None:
        answers.append(function(*arguments, **by_name))

    def queue(what: str) -> AbstractContextManager[None]:
        return waiting(what, lambda what: warn(f"{name} had not begun: it waited for {what}"))

    async def in_thread() -> None:
        raised: Exception | None = None
        async with anyio.create_task_group() as group:  # where `fractal.sync` in the function joins the run
            thread = ThreadCall(work, name, threads=threads, waiting=queue, abandon=True, group=group)
            try:
                await thread.run()
            except Exception as error:
                raised = error  # kept out of the group: trio takes the text of what ends one, and that may raise
            finally:
                if thread.abandoned:
                    warn(f"{name} could not be stopped: it goes on in its thread, and nobody waits for it")
        if raised is not None:
            raise raised

    with single_error():  # of a task group in the function, or of the one here
        if is_async(function):
            return await answered(timed(function(*arguments, **by_name), name, warn), name)
        await settled(in_thread(), name)
        return await answered(answers[0], name) if inspect.isawaitable(answers[0]) else answers[0]


def _parameters(function: Callable[..., Any], what: str) -> tuple[list[inspect.Parameter], str | None]:
    """The names of the parameters that are given values, in their order, and of the one for the context."""
    try:
        signature, hints = read_signature(function, {"RunContext": RunContext})
    except SignatureFault as error:
        raise InvalidArguments(f"{what}={repr_of(function)}: {error}") from None
    contexts = [parameter for parameter in signature if is_context(hints.get(parameter.name))]
    others = [p for p in signature if p not in contexts and p.kind is not p.VAR_KEYWORD]
    needed = [p for p in others if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if len(needed) == 2 and not contexts and needed[1].kind is not needed[1].KEYWORD_ONLY:
        contexts = [needed.pop()]
    if len(contexts) > 1 or len(needed) > 1 or not others:
        raise InvalidArguments(
            f"{what}={repr_of(function)}: give a function of one value, and of the run's context if it wants that, in a"
            " second parameter or in one annotated RunContext"
        )
    given = [(needed or others)[0], *contexts]
    return [parameter for parameter in signature if parameter in given], contexts[0].name if contexts else None
