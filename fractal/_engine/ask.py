"""One question to the model: its place in the budget, its deadline, and the only retries there are."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from fractal._concurrency.scopes import move_on_after, require_time
from fractal._copies import copied_messages
from fractal._engine.hooks import call_user
from fractal._engine.money import Money
from fractal._engine.observers import request_headers
from fractal._texts import said_by
from fractal.errors import DeadlineWouldPass, InvalidArguments, ModelError, RequestTimedOut, StatusError
from fractal.events import ModelRequested, ModelResponded, ReasoningDelta, RetryScheduled, TextDelta, ToolCallDelta
from fractal.limits import Reservation
from fractal.model import Delta, ModelRequest, Reply, ask_model
from fractal.prices import MONEY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Generator, Mapping

    from fractal._engine.pricing import Prices
    from fractal._engine.run import Run
    from fractal.messages import Message, Transcript
    from fractal.model import ToolSchemas

__all__ = ["ask", "first_request"]

FIRST_BACK_OFF = 0.5
LONGEST_BACK_OFF = 8.0
LONGEST_RETRY_AFTER = 120.0
"""Seconds. The schedule of the `openai` SDK, which users of these endpoints know."""

_LONGEST_LOADING = 60.0
"""Seconds of the loading of prices that are none of a run's."""

_COUNTS = attrgetter(
    "input_tokens", "output_tokens", "cached_input_tokens", "cache_write_input_tokens", "reasoning_tokens"
)

_CHARACTERS_PER_TOKEN = 4  # the usual rule of thumb for English text; corrected by what the endpoint reports

_CLOSING_INSTRUCTION = (
    "Time is nearly up. Give your final answer now, with what you know: there is no time to look for more."
)


class Change(Protocol):
    """The changes that hooks have made to a request.

    Attributes:
        messages: The conversation that is sent in place of the run's, or None.
        was_shown: Whether a piece of a reply has reached the reader of a stream.
    """

    messages: Transcript | None
    was_shown: bool

    def applied(self, request: ModelRequest, /) -> ModelRequest:
        """A request with the changes."""
        ...


async def ask(run: Run, change: Change | None = None) -> Reply:
    """Ask the run's model, again if that may help.

    Args:
        run: The run.
        change: What hooks have changed about the request. None: nothing.

    Raises:
        ModelError: There is no usable answer.
        BudgetExceeded: A request, or the tokens it needs, would be over the budget.
        DeadlineWouldPass: The next try would have to wait longer than there is time.
    """
    if run.journaled is not None and (recorded := await run.journaled.replies.recall(run)) is not None:
        return recorded
    attempt = 1
    while True:
        await run.clock.stop_if_cancelled()
        question = _Question(run, attempt, change)
        try:
            return await question.send(await question.fitted() if run.window is not None else question.whole())
        except ModelError as error:
            failure = error
        finally:
            if change is not None:
                change.was_shown = change.was_shown or question.was_shown
        # A run that has been cancelled meanwhile has no time left either; that is not for us to tell.
        await run.clock.stop_if_cancelled()
        if question.was_shown:  # asked again, the model would say it all a second time
            raise failure
        if _asks_in_another_way(run, failure):
            wait = 0.0
        else:
            wait = _wait_before_next(run, failure, attempt)
            attempt += 1
        await run.emitter.emit_in_turn(RetryScheduled, attempt=question.attempt, wait=wait, error=said_by(failure))
        await anyio.sleep(wait)


async def first_request(run: Run) -> ModelRequest:
    """The run's next request, as it would be sent now."""
    question = _Question(run, 1)
    return await question.fitted() if run.window is not None else question.whole()


def back_off_seconds(attempt: int) -> float:
    """Seconds to wait after so many failed tries: 0.5, 1, 2, 4, then 8, less up to a quarter at random."""
    return min(FIRST_BACK_OFF * 2.0 ** min(attempt - 1, 10), LONGEST_BACK_OFF) * random.uniform(0.75, 1.0)


class _Question:
    """One try of a request, and the run's side of it (`RequestControl`).

    Attributes:
        attempt: Try of this request, from 1.
        was_shown: Whether a piece of the reply has reached the reader of a stream.
    """

    __slots__ = (
        *("_asked", "_change", "_charged", "_first", "_left", "_money", "_pauses", "_run", "_scope"),
        *("attempt", "was_shown"),
    )

    def __init__(self, run: Run, attempt: int, change: Change | None = None) -> None:
        self._run, self.attempt, self._change = run, attempt, change
        self._scope: anyio.CancelScope | None = None  # there is one where its own time is limited
        self._pauses, self._left = 0, math.inf
        self.was_shown = False
        self._first: float | None = None  # when its first piece came
        self._money: Money | None = None  # there is one where money is limited
        self._asked: ModelRequest | None = None
        self._charged = 0  # requests besides the first

    def send(self, request: ModelRequest) -> Awaitable[Reply]:
        """Send the request; the answer is what is returned, once that has been awaited.

        Raises:
            ModelError: There is no usable answer.
        """
        is_unlimited = self._run.budget.is_unlimited("cost")
        return self._send(request) if is_unlimited else self._send_priced(request)

    async def _send_priced(self, request: ModelRequest) -> Reply:
        if self._run.prices is not None and not self._run.prices.is_loaded:
            await self._load(self._run.prices)
        async with Money(self._run, request, _prompt_tokens(request)) as self._money:
            return await self._send(request)

    async def _load(self, prices: Prices) -> None:
        """Load the library of prices, which is once in a process, outside of the run's time."""
        began = self._run.clock.now()
        self._run.clock.delay(_LONGEST_LOADING)
        try:
            await prices.load()
        finally:
            self._run.clock.delay(self._run.clock.now() - began - _LONGEST_LOADING)

    async def _send(self, request: ModelRequest) -> Reply:
        run = self._run
        has_listeners = run.emitter.has_listeners  # asked once: who is told of the request is told of the reply
        with self._tokens_set_aside(request) as tokens:
            # Spent before it is sent, and never given back: one that fails or is cut has still reached the endpoint.
            if has_listeners:
                request = await self._announced(request)
            else:
                run.budget.spend("requests")
            if run.journaled is not None:
                await run.journaled.replies.sent()
            started = run.clock.now()
            seconds = run.limits.request_timeout
            reply = await (self._ask_model(request) if seconds is None else self._ask_in_time(request, seconds))
            if run.answer is not None:
                run.answer.accepted()
            tokens.commit(reply.input_tokens + reply.output_tokens)
            prices = run.prices if reply.input_tokens or reply.output_tokens else None
            try:
                if prices is not None and not prices.is_loaded:
                    await self._load(prices)  # not sooner: a model that counts no tokens needs none
            finally:
                cost = self._settle(request, reply, prices)
            if run.journaled is not None:
                await run.journaled.replies.record(run, reply, cost, self._charged)
            if has_listeners:
                await run.emitter.emit_in_turn(ModelResponded, **self._facts_of(reply, started, cost))
            return reply

    async def _announced(self, request: ModelRequest) -> ModelRequest:
        """Spend the request and emit it; returns it with the headers that observers add."""
        run = self._run
        with run.budget.reserve("requests") as reserved:
            await run.emitter.emit_in_turn(ModelRequested, **self._facts(request))
            request = _with_headers(run, request)
            reserved.commit()
        return request

    def _settle(self, request: ModelRequest, reply: Reply, prices: Prices | None) -> int | None:
        """Enter what a reply has used; returns its cost, None if that is unknown."""
        run, cost = self._run, None
        if prices is not None and prices.is_loaded:
            price = prices.of_reply(reply, request.model, run.emitter.warn)
            cost = price.of_reply(reply) if price is not None else None
        run.budget.add_reply(reply, cost)
        if self._money is not None:
            self._money.settle(cost)
        return cost

    def charge(self) -> None:
        """Spend one more request for the same question."""
        if self._money is not None:
            self._money.charge()
        self._run.budget.spend("requests")
        self._charged += 1
        if self._run.emitter.has_listeners and self._asked is not None:
            self._run.emitter.emit(ModelRequested, **self._facts(self._asked))

    @contextmanager
    def paused(self, waiting_for: str) -> Generator[None]:
        """Stop the clock of `Limits.request_timeout` in a block, and note its wait if the run's time ends in it."""
        # A count and no flag, since pauses overlap: a model that asks others side by side (`RaceModel`) has several of
        # them wait at once, each for a slot or a connection. The first pause takes the deadline away and keeps what
        # time was left; the last to end gives that back, counted from then. With a flag the first to end would start
        # the clock while others still wait for what is no fault of the endpoint.
        scope, now = self._scope, self._run.clock.now
        if scope is not None and not self._pauses:
            self._left = scope.deadline - now()
            scope.deadline = math.inf
        self._pauses += 1
        try:
            with self._run.clock.waiting(waiting_for):
                yield
        finally:
            self._pauses -= 1
            if scope is not None and not self._pauses:
                scope.deadline = now() + self._left

    async def _ask_in_time(self, request: ModelRequest, seconds: float) -> Reply:
        with move_on_after(seconds) as self._scope:
            return await self._ask_model(request)
        raise RequestTimedOut(f"the model did not answer within the {seconds:g} s that a request may take")

    async def _ask_model(self, request: ModelRequest) -> Reply:
        model = self._run.settings.model
        self._asked = request
        try:
            reply = await ask_model(model, request, self._show if self._run.emitter.feeds else None)
        finally:
            self._asked = None  # it knows this question: both, and the run, would stay for the garbage collector
        if not isinstance(reply, Reply):
            raise InvalidArguments(f"the model {model!r} answered with {reply!r}, not a Reply")
        if min(_COUNTS(reply)) < 0:  # which would give something back to budgets
            raise InvalidArguments(f"the model {model!r} answered with fewer than no tokens: {reply!r}")
        return reply

    async def _show(self, delta: Delta) -> None:
        if not self.was_shown:
            self.was_shown, self._first = True, self._run.clock.now()
        if self._run.emitter.is_held:
            await self._wait_for_reader()
        if self._run.journaled is not None:
            unseen = await self._run.journaled.replies.shown(self._run, delta)
            if unseen is None:
                return
            delta = unseen
        match delta.kind:
            case "text":
                self._run.emitter.emit(TextDelta, text=delta.text)
            case "reasoning":
                self._run.emitter.emit(ReasoningDelta, text=delta.text)
            case _:
                self._run.emitter.emit(
                    ToolCallDelta,
                    index=delta.index,
                    call_id=delta.call_id,
                    tool_name=delta.tool_name or "",
                    arguments=delta.text,
                )
        if self._run.emitter.is_held:
            await self._wait_for_reader()

    async def _wait_for_reader(self) -> None:
        with self.paused("its reader"):  # a slow reader is not the model's fault
            await self._run.emitter.pace()

    def whole(self) -> ModelRequest:
        """The request, with all of the transcript."""
        return self._request()

    def _request(self) -> ModelRequest:
        run, answer = self._run, self._run.answer
        closing = run.clock.is_closing()
        tools: ToolSchemas | None = run.tool_schemas
        fields: Mapping[str, Any] = answer.fields() if answer is not None else {}
        if closing:
            tools, fields = _closing_tools(run, fields)
        request = ModelRequest(
            model=run.settings.model_name,
            system=answer.system(run.system) if answer is not None else run.system,
            transcript=run.transcript,
            tools=tools,
            settings=run.settings.model_settings,
            fields=fields,
            instruction=_CLOSING_INSTRUCTION if closing else None,
            control=self,
        )
        return self._change.applied(request) if self._change is not None else request

    async def fitted(self) -> ModelRequest:
        """The request, with as much of the transcript as the model's window takes."""
        request, window = self._request(), self._run.window
        assert window is not None
        if self._change is not None and self._change.messages is not None:  # the window is for the run's own
            return self.whole()
        kept, summary = await window.fit(
            window.other_tokens(request), partial(call_user, self._run.emitter.warn), reserve=window.reserve(request)
        )
        if self._run.journaled is not None:
            await self._run.journaled.replies.window(self._run)
        return replace(request, kept=kept, summary=summary)

    def _facts(self, request: ModelRequest) -> dict[str, Any]:
        run = self._run
        seen, run.seen = run.seen, len(run.transcript)
        opening, kept = request.opening(), request.kept
        if request.transcript is not run.transcript:  # a hook has put other messages in the place of all of them
            opening, kept = request.parameters()["messages"], ()
        parameters = request.settings.fields()
        return {
            "iteration": run.iterations,
            "attempt": self.attempt,
            "message_count": request.message_count,
            "model": request.model,
            "opening": copied_messages(opening),
            "added": copied_messages(run.transcript.since(seen)),
            "kept": None if kept is None else list(kept),
            "tools": request.tools.names() if request.tools is not None else [],
            "parameters": copied_messages([parameters])[0] if parameters else parameters,
            "server": _server_of(run.settings.model),
        }

    def _facts_of(self, reply: Reply, started: float, cost: int | None) -> dict[str, Any]:
        return {
            "message": _message_of(reply),
            "finish_reason": reply.finish_reason,
            "input_tokens": reply.input_tokens,
            "output_tokens": reply.output_tokens,
            "cached_input_tokens": reply.cached_input_tokens,
            "cache_write_input_tokens": reply.cache_write_input_tokens,
            "reasoning_tokens": reply.reasoning_tokens,
            "cost": cost / MONEY if cost is not None else None,
            "model": reply.model,
            "response_id": reply.id,
            "first_piece": self._first - started if self._first is not None else None,
            "elapsed": self._run.clock.now() - started,
        }

    def _tokens_set_aside(self, request: ModelRequest) -> Reservation:
        """The reservation of the tokens that a request can take; they are not counted where nothing limits them."""
        budget = self._run.budget
        if budget.is_unlimited("tokens"):
            return Reservation(budget, "tokens", 0)
        return budget.reserve("tokens", _prompt_tokens(request) + request.reply_tokens)


def _message_of(reply: Reply) -> Message:
    """The message of a reply for listeners: it is made anew, but for what the endpoint wrote besides."""
    message = reply.message()
    is_new = reply.content is None and not reply.extra and not any(call.extra for call in reply.tool_calls)
    return message if is_new else copied_messages([message])[0]


def _server_of(model: object) -> tuple[str, int] | None:
    """Host and port of the endpoint of a model that says them."""
    try:
        match getattr(model, "server", None):
            case (str() as host, int() as port):
                return host, port
            case _:
                return None
    except Exception:  # a model of a user's own has such a name for something else
        return None


def _with_headers(run: Run, request: ModelRequest) -> ModelRequest:
    headers = request_headers(run.emitter.companions, run.run_id) if run.emitter.companions else None
    return replace(request, headers=headers) if headers else request


def _prompt_tokens(request: ModelRequest) -> int:
    return len(request.body()) // _CHARACTERS_PER_TOKEN


def _closing_tools(run: Run, fields: Mapping[str, Any]) -> tuple[ToolSchemas | None, Mapping[str, Any]]:
    """The tools of the closing request: the one that takes the answer, or none that may be called."""
    answer_tool = run.answer.closing_tools() if run.answer is not None else None
    if answer_tool is not None:
        return answer_tool, fields
    # Some endpoints take no conversation with tool calls in it without tools.
    return (run.tool_schemas, {**fields, "tool_choice": "none"}) if run.transcript.has_calls else (None, fields)


def _asks_in_another_way(run: Run, error: ModelError) -> bool:
    """Whether the endpoint refuses only the way in which it was asked for the answer, and there is another."""
    return run.answer is not None and isinstance(error, StatusError) and run.answer.refused(error)


def _wait_before_next(run: Run, error: ModelError, attempt: int) -> float:
    """Seconds until the next try; raises the error if there is to be none."""
    if not error.retryable or attempt > run.settings.max_retries:
        raise run.answer.failure(error) if run.answer is not None and isinstance(error, StatusError) else error
    wait = error.retry_after if error.retry_after is not None else back_off_seconds(attempt)
    if wait > LONGEST_RETRY_AFTER:
        raise error
    try:
        require_time(wait, f"after “{said_by(error)}”, waiting to ask the model again")
    except DeadlineWouldPass as would_pass:
        raise would_pass from error
    return wait
