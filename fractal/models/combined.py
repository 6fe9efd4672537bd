"""Several models as one: the next when one fails, the fastest of some, one that waits for its turn.

Each is a `Model` like any other and can be a part of another one.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio.lowlevel import RunVar, checkpoint

from fractal._checks import is_count, is_number
from fractal._concurrency.background import Unstarted
from fractal._concurrency.gates import Gate, Waiting
from fractal._concurrency.scopes import (
    ENDS_A_LOOP,
    move_on_after,
    raising,
    require_time,
    stop_if_cancelled,
)
from fractal._log import log
from fractal._texts import said_by
from fractal.errors import (
    AllModelsFailed,
    BudgetExceeded,
    ContentFiltered,
    DeadlineWouldPass,
    InvalidArguments,
    ModelError,
    RequestTimedOut,
    RunError,
)
from fractal.model import Delta, Model, ModelRequest, Reply, Sink, ask_model
from fractal.models.openai import OpenAIModel, model_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["CombinedModel", "FallbackModel", "LimitedModel", "RaceModel", "names_asked"]

_FAILURES = (ModelError, DeadlineWouldPass, BudgetExceeded)
"""What keeps one model from answering, but maybe not another one."""


class CombinedModel(ABC):
    """A model made of others; the base of `FallbackModel`, `RaceModel` and `LimitedModel`.

    Attributes:
        models: Those it is made of.
    """

    needs_no_grace = True  # its models have theirs

    def __init__(self, models: Iterable[Any]) -> None:
        self.models: tuple[Model, ...] = tuple(map(_member, models))

    async def respond(self, request: ModelRequest) -> Reply:
        """Answer one request.

        Raises:
            ModelError: There is no usable answer.
            BudgetExceeded: The run's budget has no request left for the next model.
            DeadlineWouldPass: The turn of a `LimitedModel` would come too late.
        """
        return await self._answer(request, None)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        """Answer one request, handing out each piece as it comes; a model that cannot stream gives one piece.

        Raises:
            ModelError: There is no usable answer, or it broke off.
            BudgetExceeded: The run's budget has no request left for the next model.
            DeadlineWouldPass: The turn of a `LimitedModel` would come too late.
        """
        return await self._answer(request, sink)

    async def aclose(self) -> None:
        """Close what the models opened for the running event loop: all of them that have an `aclose` too."""
        async with AsyncExitStack() as stack:  # it goes on to the others when one fails
            for model in self.models:
                if callable(getattr(model.__class__, "aclose", None)):
                    stack.push_async_callback(cast("Any", model).aclose)

    @abstractmethod
    async def _answer(self, request: ModelRequest, sink: Sink | None) -> Reply:
        """Answer, in pieces if there is a sink."""


class FallbackModel(CombinedModel):
    """A model that asks the first of its models and, when that fails, the next.

    A model fails with any `ModelError`, whether asking it again could help or not, when a content filter withholds its
    answer, or when its turn would come too late (`DeadlineWouldPass`). Once a piece of a reply has been streamed, a
    failure is final. Each further request counts in the run's budget. The run's own retries ask them all once more,
    from the first.

    Args:
        *models: Two or more, in this order: models, or what an agent takes as `client=`. Each is asked for the agent's
            `model`; for another name, give `OpenAIModel(…, model="…")`.
        after: Seconds until a model that has not answered, or has not shown a first piece, is cancelled and the next
            is asked; the last one has as long as the request may take. None: so has each.

    Raises:
        InvalidArguments: There are fewer than two, one cannot be asked, or `after` is no time.

    Example:
        >>> from fractal import OpenAIModel
        >>> model = FallbackModel(
        ...     OpenAIModel(base_url="http://127.0.0.1:8000/v1"),
        ...     OpenAIModel(base_url="http://127.0.0.1:8001/v1", model="small"),
        ...     after=10,
        ... )
    """

    def __init__(self, *models: Any, after: float | None = None) -> None:
        super().__init__(_several(models, "FallbackModel"))
        if after is not None and not (is_number(after) and 0 < after < math.inf):
            raise InvalidArguments(f"after={after!r}: give seconds above 0, or None")
        self._after = math.inf if after is None else after

    async def _answer(self, request: ModelRequest, sink: Sink | None) -> Reply:
        failures: list[RunError] = []
        for number, model in enumerate(self.models, 1):
            if failures:
                log.info(f"a model failed, the next is asked: {said_by(failures[-1])}")
                # What failed may have failed because of a cancellation, which comes first.
                await stop_if_cancelled()
                _charge(request, failures[-1])
            is_last = number == len(self.models)
            attempt = _Try(model, request, sink, seconds=math.inf if is_last else self._after)
            await attempt.run()
            if attempt.reply is not None and (is_last or attempt.has_begun or not attempt.reply.is_filtered):
                return attempt.reply
            failures.append(attempt.failed())
            if attempt.has_begun:
                raise failures[-1]
        raise _one_of(failures)


class RaceModel(CombinedModel):
    """A model that asks all its models at once and takes the first good answer.

    The others are cancelled, and their connections closed, before the answer comes back. A reply with neither text nor
    tool calls nor a refusal, and one that a content filter has cut, win only if there is no better one. When streaming,
    the first to show a piece has won, and a failure after that is final. All requests count in the run's budget; if
    that has not enough left, only the first models are asked. `Limits.request_timeout` stands still while one of them
    waits in a `LimitedModel`.

    Args:
        *models: Two or more: models, or what an agent takes as `client=`. Each is asked for the agent's `model`; for
            another name, give `OpenAIModel(…, model="…")`.

    Raises:
        InvalidArguments: There are fewer than two, or one cannot be asked.

    Example:
        >>> from fractal import OpenAIModel
        >>> model = RaceModel(
        ...     OpenAIModel(base_url="http://127.0.0.1:8000/v1"),
        ...     OpenAIModel(base_url="http://127.0.0.1:8001/v1"),
        ... )
    """

    def __init__(self, *models: Any) -> None:
        super().__init__(_several(models, "RaceModel"))

    async def _answer(self, request: ModelRequest, sink: Sink | None) -> Reply:
        winner: _Try | None = None
        broken: list[BaseException] = []
        running, over = 0, anyio.Event()

        def win(one: _Try) -> None:
            nonlocal winner
            winner = one
            for other in tries:
                if other is not one:
                    other.scope.cancel()

        async def run(one: _Try) -> None:
            nonlocal running
            try:
                await one.run()
                if winner is None and one.reply is not None and not _is_poor(one.reply):
                    win(one)
            except (Exception, *ENDS_A_LOOP) as error:
                broken.append(error)
                group.cancel_scope.cancel()
            finally:
                running -= 1
                if not running:
                    over.set()

        tries = [_Try(model, request, sink, on_begin=win) for model in self._affordable(request)]
        running = len(tries)
        with raising(broken):
            async with anyio.create_task_group() as group:
                for one in tries:
                    group.start_soon(Unstarted, run, one, name="fractal model in a race")
                await over.wait()
        return _outcome(tries, winner)

    def _affordable(self, request: ModelRequest) -> Sequence[Model]:
        """The models that the budget allows to ask, charged; the first was charged by the caller."""
        for count in range(1, len(self.models)):
            try:
                request.charge()
            except BudgetExceeded:
                return self.models[:count]
        return self.models


class LimitedModel(CombinedModel):
    """A model that lets only so many requests at a time through to another, first come, first served.

    The limit holds over all runs that use this object, on any event loop and thread of the process. Waiting is no part
    of `Limits.request_timeout`. A wait for the rate that cannot end before the run's deadline is not begun.

    Args:
        model: A model, or what an agent takes as `client=`.
        max_concurrency: Requests that may be on their way at a time; a streamed one is until its reply is whole. None:
            any number.
        rate: How many requests may begin within how many seconds: `(60, 60.0)` lets at most 60 begin within any 60
            seconds, all at once if they come so, and `(1, 1.0)` keeps them a second apart. None: any number.

    Raises:
        InvalidArguments: The model cannot be asked, there is no limit, or a limit is not a positive number.

    Example:
        >>> from fractal import OpenAIModel
        >>> model = LimitedModel(OpenAIModel(), max_concurrency=8, rate=(500, 60.0))
    """

    def __init__(
        self, model: Any, *, max_concurrency: int | None = None, rate: tuple[int, float] | None = None
    ) -> None:
        super().__init__([model])
        if max_concurrency is None and rate is None:
            raise InvalidArguments("a LimitedModel needs a limit: give max_concurrency=, rate=, or both")
        if max_concurrency is not None and not is_count(max_concurrency, 1):
            raise InvalidArguments(f"max_concurrency={max_concurrency!r}: give a whole number from 1 up, or None")
        self._slots = _Line(max_concurrency or math.inf, f"its turn at the model (max_concurrency={max_concurrency})")
        self._rate = _Rate(*_checked_rate(rate)) if rate is not None else None

    async def _answer(self, request: ModelRequest, sink: Sink | None) -> Reply:
        with ExitStack() as held:
            if self._rate is not None:
                with request.paused(self._rate.what):
                    self._rate.require_time(self._slots.waiting + self._rate.line.length)
            await self._slots.acquire(request.paused)
            held.callback(self._slots.release)
            if self._rate is not None:
                await self._rate.take_turn(request.paused)
            return await _ask(self.models[0], request, sink)


class _Try:
    """The request to one of several models.

    Attributes:
        scope: Cancelled when its time is up, or when another one was faster.
        has_begun: Whether a piece of its reply was handed out.
        reply: What it answered, if it did.
    """

    def __init__(
        self,
        model: Model,
        request: ModelRequest,
        sink: Sink | None,
        *,
        seconds: float = math.inf,
        on_begin: Callable[[_Try], None] | None = None,
    ) -> None:
        self._model, self._request, self._sink = model, request, sink
        self._seconds, self._on_begin = seconds, on_begin
        self.scope = move_on_after(seconds)
        self.has_begun = False
        self.reply: Reply | None = None
        self._failure: RunError | None = None

    async def run(self) -> None:
        """Ask the model; keep its reply or its exception."""
        if self.scope.cancel_called:  # the race was over before this one could start
            return
        with self.scope:
            try:
                self.reply = await _ask(self._model, self._request, self._hand_out if self._sink is not None else None)
            except _FAILURES as error:
                self._failure = error

    def failed(self) -> RunError:
        """The reason why the try has no usable reply."""
        if self.reply is not None:
            return ContentFiltered("the endpoint's content filter withheld the answer")
        return self._failure or RequestTimedOut(f"the model did not begin to answer within {self._seconds:g} s")

    async def _hand_out(self, delta: Delta) -> None:
        assert self._sink is not None
        if self.scope.cancel_called:
            await checkpoint()
            return  # a model that shields itself gets here: nobody waits for its pieces any more
        if not self.has_begun:
            self.has_begun = True
            self.scope.deadline = math.inf
            if self._on_begin is not None:
                self._on_begin(self)
        await self._sink(delta)


class _Line(Gate):
    """A gate that counts those in it and those waiting."""

    @property
    def length(self) -> int:
        return self.held + self.waiting


class _Rate:
    """A limit of starts within any window of time.

    Attributes:
        what: What is waited for, in words.
        line: Where all wait for their turn; the first of them for its time.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._starts = deque([-math.inf] * count, maxlen=count)
        self.what = f"its turn at the model's rate ({count} in {seconds:g} s)"
        self.line = _Line(1, self.what)

    async def take_turn(self, waiting: Waiting) -> None:
        """Wait until another start is allowed.

        Args:
            waiting: Around each wait, which is no time of the request's.

        Raises:
            DeadlineWouldPass: That is later than the deadline.
        """
        async with self.line.slot(waiting):
            with waiting(self.what):
                while wait := self.require_time(0):  # noqa: ASYNC110  # a timer may fire a little early
                    await anyio.sleep(wait)
            self._starts.append(_now())

    def require_time(self, ahead: int) -> float:
        """Seconds until a start is allowed that has so many ahead of it.

        Raises:
            DeadlineWouldPass: That is later than the deadline.
        """
        rounds, index = divmod(ahead, len(self._starts))
        wait = max(self._starts[index] + self._seconds - _now(), 0.0) + rounds * self._seconds
        require_time(wait, f"waiting for {self.what}")
        return wait


_behind: RunVar[float] = RunVar("fractal_clock_behind")


def _now() -> float:
    """Seconds on a clock that all event loops share, and that runs as the one of this loop does."""
    here = anyio.current_time()
    try:
        return here + _behind.get()
    except LookupError:
        _behind.set(time.monotonic() - here)
        return here + _behind.get()


def names_asked(model: Model, name: str) -> tuple[str, ...]:
    """The names of the models that may answer a question to a model, at their endpoints.

    Args:
        model: The model.
        name: What an agent calls it.
    """
    if isinstance(model, CombinedModel):
        return tuple(dict.fromkeys(each for member in model.models for each in names_asked(member, name)))
    return (model.name or name,) if isinstance(model, OpenAIModel) else (name,)


async def _ask(model: Model, request: ModelRequest, sink: Sink | None) -> Reply:
    reply: object = await ask_model(model, request, sink)
    if not isinstance(reply, Reply):
        raise InvalidArguments(f"the model {model!r} answered with {reply!r}, which is no Reply")
    return reply


def _charge(request: ModelRequest, failure: RunError) -> None:
    try:
        request.charge()
    except BudgetExceeded as error:
        raise error from failure


def _outcome(tries: Sequence[_Try], winner: _Try | None) -> Reply:
    """The outcome of a race: the winner's reply, else a poor one, else an error."""
    if winner is not None and winner.reply is None:
        raise winner.failed()
    for one in tries if winner is None else [winner]:
        if one.reply is not None:
            return one.reply
    raise _one_of([one.failed() for one in tries])


def _is_poor(reply: Reply) -> bool:
    return reply.is_filtered or not (reply.text or reply.tool_calls or reply.refusal)


def _one_of(failures: Sequence[RunError]) -> RunError:
    """One error for all failures."""
    limits = [error for error in failures if not isinstance(error, ModelError)]
    spent = [error for error in limits if isinstance(error, BudgetExceeded)]
    if len(limits) == len(failures) or spent:
        return (spent or limits)[-1]  # a limit of the run's own: what the endpoints said does not matter any more
    if len(failures) == 1:
        return failures[0]
    failure = AllModelsFailed(failures)
    failure.__cause__ = ExceptionGroup("what each model failed with", failures)
    return failure


def _several(models: Sequence[Any], kind: str) -> Sequence[Any]:
    if len(models) < 2:
        raise InvalidArguments(f"{kind} got {len(models)} models: give two or more, each as an argument of its own")
    return models


def _member(client: Any) -> Model:
    if client is None:
        raise InvalidArguments("one of the models is None: for the endpoint of the environment give OpenAIModel()")
    return model_for(client)


def _checked_rate(rate: Any) -> tuple[int, float]:
    if isinstance(rate, (tuple, list)) and len(cast("list[Any]", rate)) == 2:
        count, seconds = cast("list[Any]", rate)
        if is_count(count, 1) and is_number(seconds) and 0 < seconds < math.inf:
            return count, seconds
    raise InvalidArguments(f"rate={rate!r}: give how many requests in how many seconds, such as (60, 60.0)")
