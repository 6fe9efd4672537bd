"""Requests inside the hooks around them, the outermost first: each goes on with those inside, or answers itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fractal._engine.around import awaited_or_joined
from fractal._engine.ask import ask, first_request
from fractal._engine.below import origin_here
from fractal._engine.guards import ask_guarded
from fractal._engine.hooks import call_user
from fractal._engine.overrides import is_tool_schema
from fractal._engine.request_fields import REQUEST_FIELDS
from fractal._json import is_list
from fractal._texts import name_of, one_line, repr_of
from fractal.around import PendingRequest, Shown, is_changed
from fractal.errors import InvalidArguments, RequestTimedOut
from fractal.events import TextDelta
from fractal.messages import AS_WRITTEN, Transcript
from fractal.model import Reply, ToolSchemas

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from fractal._engine.run import Run
    from fractal.around import Around, Guard
    from fractal.messages import Message
    from fractal.model import ModelRequest

__all__ = ["Asking"]


class Asking:
    """The asking of the model by a run that has guards or hooks around its requests.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._guards: Sequence[Guard] = run.hooks.guards
        self._ask = _ask_around if run.hooks.around_model else ask

    async def __call__(self, run: Run) -> Reply:
        """Ask the model, the first time with the guards beside the request; raises as `ask` and as the guards do."""
        guards, self._guards = self._guards, ()
        return await (ask_guarded(run, guards, self._ask) if guards else self._ask(run))


async def _ask_around(run: Run) -> Reply:
    """Ask the model of a run by the first of the hooks around its requests."""
    run.offered = None
    asked = _Asked(run, await first_request(run))
    reply = await asked.by_hook(0, asked.original)
    if run.emitter.feeds:
        await asked.show(reply)
    return reply


class _Asked:
    """One request, from the first hook around it to the model.

    Args:
        run: The run.
        request: The request as it would be sent without hooks.

    Attributes:
        original: The request in the form that hooks see.
    """

    def __init__(self, run: Run, request: ModelRequest) -> None:
        self._run, self._request = run, request
        self._hooks: Sequence[Around] = run.hooks.around_model
        self._shown: Reply | None = None  # the last reply of which a piece has been shown
        self._broken: Exception | None = None  # how one ended of which a piece had been shown
        settings, is_closing = request.settings, request.instruction is not None
        self.original = PendingRequest(
            model=request.model,
            messages=Shown(lambda: request.transcript.sent(request.kept, AS_WRITTEN)),
            system=run.system,
            tools=Shown(lambda: [] if is_closing else run.settings.toolkit.schemas().schemas),
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            reasoning_effort=settings.reasoning_effort,
            extra_body=settings.extra,
        )

    async def by_hook(self, position: int, request: PendingRequest) -> Reply:
        """Have the hook at a position answer; after the last hook, the model."""
        if position == len(self._hooks):
            return await self._send(request)
        run, function = self._run, self._hooks[position].function
        go_on = _Next(run, partial(self.by_hook, position + 1), request, name_of(function))
        try:
            answer = await call_user(run.emitter.warn, function, run.hook_context(), request, go_on)
        finally:
            go_on.is_over = True
        return _reply_of(answer, go_on.last, name_of(function))

    async def _send(self, request: PendingRequest) -> Reply:
        if self._broken is not None:  # sent again, the model would say it all a second time
            raise self._broken
        change = RequestChange(self._run, self._request, request, self.original)
        self._run.offered = change.offered
        try:
            reply = await ask(self._run, change)
        except BaseException as error:
            if change.was_shown:
                self._broken = error if isinstance(error, Exception) else RequestTimedOut(_CUT)
            raise
        if change.was_shown:
            self._shown = reply
        return reply

    async def show(self, reply: Reply) -> None:
        """Show the text of a reply that is not the model's, or warn that another one was shown."""
        shown = self._shown
        if shown is None and reply.text:
            await self._run.emitter.emit_in_turn(TextDelta, text=reply.text)
        elif shown is not None and reply is not shown and reply.text != shown.text:
            warn = self._run.emitter.warn
            warn("a hook around the request gave another text than that of the reply that was streamed")


_CUT = "a hook has cut a request of which a piece had been streamed: sent again, it would be said a second time"


class _Next:
    """The callable that a hook goes on with (`NextRequest`).

    Attributes:
        is_over: Whether the hook has ended.
        last: The last reply that it was given.
    """

    def __init__(
        self, run: Run, go_on: Callable[[PendingRequest], Awaitable[Reply]], request: PendingRequest, hook: str
    ) -> None:
        self._run, self._go_on, self._request, self._hook = run, go_on, request, hook
        self._is_busy = self.is_over = False
        self.last: Reply | None = None

    def __call__(self, request: PendingRequest | None = None, /) -> Any:
        return awaited_or_joined(partial(self._go, self._request if request is None else request))

    async def _go(self, request: object) -> Reply:
        if self.is_over:
            raise InvalidArguments(f"next(…) of hook {self._hook!r} was called after the hook had ended")
        if self._is_busy:
            raise InvalidArguments(
                f"next(…) of hook {self._hook!r} was called while an earlier call of it goes on: await one after the"
                " other; RaceModel asks several models at once"
            )
        if not isinstance(request, PendingRequest):
            raise InvalidArguments(f"next({one_line(repr_of(request), 100)}): give the request, or nothing")
        self._is_busy = True
        try:
            # In a task of its own: the one that calls this belongs to a function of the user's.
            name = f"fractal request of {self._run.settings.agent_name}"
            self.last = reply = await origin_here().do(partial(self._go_on, request), name)
            return reply
        finally:
            self._is_busy = False


def _reply_of(answer: object, last: Reply | None, hook: str) -> Reply:
    """The reply that a hook answers with.

    Raises:
        InvalidArguments: It is none.
    """
    if isinstance(answer, Reply):
        return answer
    if isinstance(answer, str):
        return Reply(text=answer)
    if answer is None and last is not None:
        return last
    raise InvalidArguments(
        f"hook {hook!r} around requests returned {one_line(repr_of(answer), 100)}: return the Reply of await next(…),"
        " one of your own, or text"
    )


class RequestChange:
    """The changes that hooks have made to a request, applied each time it is sent.

    Args:
        run: The run.
        request: The request as it would be sent without hooks.
        pending: What the hooks want to be sent.
        original: What they were shown first.

    Raises:
        InvalidArguments: The request cannot be sent.
        InvalidMessages: The conversation is none that an endpoint accepts.

    Attributes:
        messages: The conversation that is sent in place of the run's, or None.
        offered: Names of the tools that may be called, if that was changed, or None.
        was_shown: Whether a piece of a reply has reached the reader of a stream.
    """

    def __init__(self, run: Run, request: ModelRequest, pending: PendingRequest, original: PendingRequest) -> None:
        self._run = run
        changed = {name for name in _CHECKS if is_changed(pending, name, original)}
        checked: dict[str, Any] = {name: _CHECKS[name](getattr(pending, name)) for name in changed}
        self._summary = request.summary
        self._plain: dict[str, Any] = {"model": checked["model"]} if "model" in changed else {}
        if changed & _OF_SETTINGS.keys():
            fields = {field: checked[name] for name, field in _OF_SETTINGS.items() if name in changed}
            self._plain["settings"] = replace(request.settings, **fields)
        self._system: tuple[str | None, ...] = (checked["system"],) if "system" in changed else ()
        self._tools: list[dict[str, Any]] | None = checked.get("tools")
        self.messages: Transcript | None = checked.get("messages")
        self.offered = self._names()
        self.was_shown = False

    def applied(self, request: ModelRequest) -> ModelRequest:
        """A request of the run with the changes; the form of the answer is still asked for."""
        answer, changes = self._run.answer, dict(self._plain)
        for system in self._system:
            changes["system"] = answer.system(system) if answer is not None else system
        if self._tools is not None and request.instruction is None:
            changes["tools"] = ToolSchemas([*self._tools, *self._of_answer(request)])
        if self.messages is not None:
            changes |= {"transcript": self.messages, "kept": None, "summary": self._summary}
        return replace(request, **changes) if changes else request

    def _of_answer(self, request: ModelRequest) -> list[dict[str, Any]]:
        """The tool that takes the answer, if the request offers it."""
        schemas = request.tools.schemas if request.tools is not None else []
        return [schema for schema in schemas if schema["function"]["name"] == self._name_of_answer()]

    def _name_of_answer(self) -> str | None:
        return self._run.answer.tool_name if self._run.answer is not None else None

    def _names(self) -> frozenset[str] | None:
        if self._tools is None:
            return None
        return frozenset({*(schema["function"]["name"] for schema in self._tools), self._name_of_answer() or ""})


def _model(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidArguments(f"a request to the model {repr_of(value)}: give the model's name")
    return value


def _system(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidArguments(f"a request with system={one_line(repr_of(value), 100)}: give text, or None")
    return value


def _messages(value: object) -> Transcript:
    if not is_list(value) and not isinstance(value, tuple):
        raise InvalidArguments(f"a request with messages={one_line(repr_of(value), 100)}: give a list of messages")
    messages: Sequence[Message] = cast("Any", value)
    return Transcript(messages)


def _tools(value: object) -> list[dict[str, Any]]:
    listed: list[Any] = [*cast("Any", value)] if isinstance(value, (list, tuple)) else [None]
    if not all(map(is_tool_schema, listed)):
        shown = one_line(repr_of(listed), 100)
        raise InvalidArguments(f"a request with tools={shown}: give a list of schemas, such as some of those it has")
    return listed


_OF_SETTINGS = {
    "temperature": "temperature",
    "max_tokens": "max_tokens",
    "reasoning_effort": "reasoning_effort",
    "extra_body": "extra",
}
_CHECKS = {
    "model": _model,
    "system": _system,
    "messages": _messages,
    "tools": _tools,
    **REQUEST_FIELDS,
}
