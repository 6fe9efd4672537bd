"""Models in combination: a fallback, a race, a limit; at real endpoints, and on a clock of our own."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
import openai
import pytest
import trio
import trio.testing

from fractal import BaseAgent, Limits, OpenAIModel, sync
from fractal.errors import (
    AllModelsFailed,
    BadReply,
    BudgetExceeded,
    ConnectionFailed,
    DeadlineWouldPass,
    InvalidArguments,
    RequestTimedOut,
    ServerError,
    StatusError,
)
from fractal.messages import Transcript
from fractal.model import Delta, Model, Sink, StreamingModel, ToolCall
from fractal.models import FallbackModel, LimitedModel, ModelRequest, RaceModel, Reply
from fractal.testing import Endpoint, answers
from fractal.testing._leftovers import running_tasks
from tests.support import calls_then, in_thread

StartEndpoint = Callable[..., Endpoint]
Combine = Callable[..., Model]

virtual_time = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}), id="virtual")]
)


def at(endpoint: Endpoint, **options: Any) -> OpenAIModel:
    return OpenAIModel(base_url=endpoint.url, api_key="sk-test", **options)


def question(control: Any = None) -> ModelRequest:
    return ModelRequest(
        model="the agent's", system=None, transcript=Transcript([{"role": "user", "content": "?"}]), control=control
    )


@dataclass
class Control:
    """The run's side of a request: so many more may be sent."""

    left: float = 99
    charged: int = 0

    def charge(self) -> None:
        if self.charged >= self.left:
            raise BudgetExceeded("requests", self.left, self.charged)
        self.charged += 1

    @contextmanager
    def paused(self, waiting_for: str) -> Generator[None]:
        yield


@dataclass
class Asked:
    """How a model is asked, and what it showed meanwhile."""

    streams: bool
    pieces: list[str] = field(default_factory=list)
    began: anyio.Event = field(default_factory=anyio.Event)

    async def __call__(self, model: Any, control: Control | None = None) -> Reply:
        if self.streams:
            return await model.stream(question(control), self.show)
        return await model.respond(question(control))

    async def show(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.began.set()

    def assert_showed(self, text: str | None) -> None:
        assert "".join(self.pieces) == (text if self.streams and text else "")


@pytest.fixture(params=["respond", "stream"])
def ask(request: pytest.FixtureRequest) -> Asked:
    return Asked(request.param == "stream")


class Plain:
    """A model that cannot stream."""

    def __init__(self, answer: Reply | BaseException, *, delay: float = 0.0) -> None:
        self.answer, self.delay = answer, delay
        self.asked = 0
        self.cancelled = 0
        self.closed = 0

    async def respond(self, request: ModelRequest) -> Reply:
        self.asked += 1
        try:
            await anyio.sleep(self.delay)
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    async def aclose(self) -> None:
        self.closed += 1


class Pieces:
    """A model that streams its pieces, so many seconds before each."""

    def __init__(self, *pieces: str, delay: float = 0.0) -> None:
        self.pieces, self.delay = pieces, delay

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError("not in a stream")

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        for piece in self.pieces:
            await anyio.sleep(self.delay)
            await sink(Delta("text", piece))
        return Reply(text="".join(self.pieces))


class Watched:
    """A model behind which another one is asked, with a look at when, and at how many there are at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.times: list[float] = []
        self.now = self.most = 0

    async def respond(self, request: ModelRequest) -> Reply:
        with self.noted():
            return await self.model.respond(request)

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        with self.noted():
            return await self.model.stream(request, sink)

    @contextmanager
    def noted(self) -> Generator[None]:
        with self.lock:
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield
        finally:
            with self.lock:
                self.now -= 1


# ---- arguments


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: FallbackModel(), "0 models"),
        (lambda: FallbackModel(OpenAIModel()), "1 models"),
        (lambda: RaceModel([OpenAIModel(), OpenAIModel()]), "argument of its own"),
        (lambda: RaceModel(OpenAIModel(), "gpt-4o"), "gpt-4o"),
        (lambda: FallbackModel(OpenAIModel(), None), "OpenAIModel()"),
        (lambda: FallbackModel(OpenAIModel(), OpenAIModel(), after=0), "after=0"),
        (lambda: FallbackModel(OpenAIModel(), OpenAIModel(), after=float("nan")), "after=nan"),
        (lambda: LimitedModel(OpenAIModel()), "needs a limit"),
        (lambda: LimitedModel(42, max_concurrency=1), "42"),
        (lambda: LimitedModel(OpenAIModel(), max_concurrency=0), "max_concurrency=0"),
        (lambda: LimitedModel(OpenAIModel(), max_concurrency=1.5), "max_concurrency=1.5"),
        (lambda: LimitedModel(OpenAIModel(), max_concurrency=True), "max_concurrency=True"),
        (lambda: LimitedModel(OpenAIModel(), rate=10), "rate=10"),
        (lambda: LimitedModel(OpenAIModel(), rate=(10,)), "rate=(10,)"),
        (lambda: LimitedModel(OpenAIModel(), rate=(0, 1)), "rate=(0, 1)"),
        (lambda: LimitedModel(OpenAIModel(), rate=(10, 0)), "rate=(10, 0)"),
        (lambda: LimitedModel(OpenAIModel(), rate=(10, float("inf"))), "rate=(10, inf)"),
        (lambda: LimitedModel(OpenAIModel(), rate=("10", 1)), "rate=('10', 1)"),
        (lambda: OpenAIModel(model=""), "model=''"),
    ],
)
def test_what_cannot_be_combined_is_refused_at_once_with_a_hint(make: Callable[[], object], word: str):
    with pytest.raises(InvalidArguments) as caught:
        make()
    assert word in str(caught.value)


@pytest.mark.parametrize("combine", [FallbackModel, RaceModel])
def test_a_combination_is_a_model_that_streams(combine: Combine):
    assert isinstance(combine(OpenAIModel(), OpenAIModel()), StreamingModel)
    assert isinstance(LimitedModel(OpenAIModel(), rate=[2, 1]), StreamingModel)


# ---- one after the other


@pytest.mark.parametrize(
    "fault",
    [
        answers.failure(500),
        answers.failure(400, "no such model"),
        answers.failure(401),
        answers.failure(429, code="insufficient_quota"),
        answers.nothing(),
        answers.raw("<h1>hello</h1>"),
    ],
    ids=lambda fault: f"{fault.status} {fault.wire}",
)
async def test_any_failure_of_a_model_makes_the_next_one_answer(
    fault: answers.Answer, ask: Asked, endpoint: StartEndpoint
):
    first, second, third = endpoint(fault), endpoint("from the second"), endpoint("never")
    control = Control()
    reply = await ask(FallbackModel(at(first), at(second), at(third)), control)
    assert reply.text == "from the second"
    ask.assert_showed(reply.text)
    # What may refuse the usage at the end of a stream is asked once more, without.
    again = ask.streams and fault.status in (400, 500)
    assert [len(one.requests) for one in (first, second, third)] == [1 + again, 1, 0]
    assert control.charged == 1 + again


async def test_an_endpoint_that_is_not_there_makes_the_next_one_answer(endpoint: StartEndpoint):
    gone = endpoint()
    gone.close()
    model = FallbackModel(at(gone), at(endpoint("here")))
    assert (await BaseAgent("A", "a", client=model).run("go")).content == "here"


async def test_a_model_of_a_combination_can_have_a_name_of_its_own(ask: Asked, endpoint: StartEndpoint):
    first, second = endpoint(answers.failure(500)), endpoint("ok")
    await ask(FallbackModel(at(first), at(second, model="another")))
    assert [one.requests[0].body["model"] for one in (first, second)] == ["the agent's", "another"]


@pytest.mark.parametrize("make", [openai.AsyncOpenAI, openai.OpenAI, lambda **facts: OpenAIModel(**facts)])
async def test_what_an_agent_takes_as_a_client_can_be_combined(
    make: Callable[..., Any], ask: Asked, endpoint: StartEndpoint
):
    failing, hanging = endpoint(answers.failure(500)), endpoint(answers.hang())
    good = endpoint(answers.text("good", delay=0.2))
    clients = [make(base_url=one.url, api_key="sk-test") for one in (failing, hanging, good)]
    model = FallbackModel(clients[0], RaceModel(*clients[1:]))
    with anyio.fail_after(5):
        assert (await ask(model)).text == "good"
    ask.assert_showed("good")
    await in_thread(hanging.wait_for_disconnects, 1)


async def test_when_all_fail_one_error_has_every_failure(ask: Asked, endpoint: StartEndpoint):
    first, second = endpoint(answers.failure(503, "overloaded", retry_after=7)), endpoint(answers.failure(404, "who?"))
    with pytest.raises(AllModelsFailed) as caught:
        await ask(FallbackModel(at(first), at(second)))
    error = caught.value
    assert [type(one) for one in error.errors] == [ServerError, StatusError]
    assert (error.retryable, error.retry_after) == (True, 7)
    assert "(1) HTTP 503: overloaded; (2) HTTP 404: who?" in str(error)
    assert isinstance(error.__cause__, ExceptionGroup)
    assert error.__cause__.exceptions == error.errors
    loaded = pickle.loads(pickle.dumps(error))
    assert [type(one) for one in loaded.errors] == [ServerError, StatusError]
    assert (str(loaded), loaded.errors[0].status, loaded.retry_after) == (str(error), 503, 7)


async def test_a_run_asks_all_models_again_if_that_may_help(endpoint: StartEndpoint):
    first = endpoint([answers.failure(503, retry_after=0), answers.failure(400)])
    second = endpoint([answers.failure(400), "at last"])
    result = await BaseAgent("A", "a", client=FallbackModel(at(first), at(second))).run("go")
    assert result.content == "at last"
    assert (first.answers_left, second.answers_left) == (0, 0)


async def test_a_run_that_no_model_can_answer_says_why_each_could_not(endpoint: StartEndpoint):
    model = FallbackModel(at(endpoint(answers.failure(400, "too long"))), at(endpoint(answers.failure(403, "go away"))))
    result = await BaseAgent("A", "a", client=model).run("go")
    assert (result.success, result.stop_reason) == (False, "model_error")
    assert "too long" in (result.error or "")
    assert "go away" in (result.error or "")
    with pytest.raises(AllModelsFailed):
        result.raise_for_error()


async def test_what_has_begun_to_stream_is_not_said_again_by_another_model(endpoint: StartEndpoint):
    first, second = endpoint(answers.cut("one two three four five six")), endpoint("never")
    ask = Asked(streams=True)
    with pytest.raises(ConnectionFailed):
        await ask(FallbackModel(at(first), at(second)))
    assert "".join(ask.pieces).startswith("one ")
    assert second.requests == []


@pytest.mark.parametrize("requests", [1, 2])
async def test_a_fallback_never_sends_more_than_the_budget_has(requests: int, endpoint: StartEndpoint):
    first, second, third = endpoint(answers.failure(500)), endpoint(answers.failure(400)), endpoint("never")
    model = FallbackModel(at(first), at(second), at(third))
    result = await BaseAgent("A", "a", client=model).run("go", limits=Limits(max_requests=requests))
    assert result.stop_reason == "budget"
    assert [len(one.requests) for one in (first, second, third)] == [1, requests - 1, 0]
    assert result.usage.requests == requests


async def test_a_spent_budget_names_the_failure_that_it_could_not_make_good(ask: Asked, endpoint: StartEndpoint):
    with pytest.raises(BudgetExceeded) as caught:
        await ask(FallbackModel(at(endpoint(answers.failure(500))), at(endpoint("never"))), Control(left=0))
    assert isinstance(caught.value.__cause__, ServerError)


async def test_a_model_that_does_not_answer_in_time_is_left_for_the_next(ask: Asked, endpoint: StartEndpoint):
    first, second = endpoint(answers.hang()), endpoint(answers.text("slow, but last", delay=0.3))
    with anyio.fail_after(3):
        reply = await ask(FallbackModel(at(first), at(second), after=0.1))
    assert reply.text == "slow, but last"
    await in_thread(first.wait_for_disconnects, 1)


@virtual_time
async def test_a_model_that_has_begun_to_stream_may_take_its_time():
    ask = Asked(streams=True)
    model = FallbackModel(Pieces("a", "b", "c", delay=4), Pieces("never"), after=5)
    assert (await ask(model)).text == "abc"
    assert ask.pieces == ["a", "b", "c"]


@virtual_time
@pytest.mark.parametrize("streams", [False, True])
async def test_when_all_are_too_slow_the_error_says_how_long_they_had(streams: bool):
    model = FallbackModel(Plain(Reply(text="x"), delay=9), Plain(BadReply("a page"), delay=9), after=5)
    with pytest.raises(AllModelsFailed) as caught:
        await Asked(streams)(model)
    assert [type(error) for error in caught.value.errors] == [RequestTimedOut, BadReply]
    assert "5 s" in str(caught.value)
    assert caught.value.retryable


@virtual_time
async def test_one_model_can_be_its_own_fallback():
    class Second(Plain):
        async def respond(self, request: ModelRequest) -> Reply:
            self.delay = 9 if not self.asked else 8
            return await super().respond(request)

    model = Second(Reply(text="the second time"))
    began = anyio.current_time()
    assert (await FallbackModel(model, model, after=5).respond(question())).text == "the second time"
    assert anyio.current_time() - began == 5 + 8


async def test_a_cancelled_model_that_reports_a_failure_makes_no_other_model_answer():
    class Mistranslates(Plain):
        async def respond(self, request: ModelRequest) -> Reply:
            try:
                return await super().respond(request)
            except anyio.get_cancelled_exc_class():
                raise ConnectionFailed("the connection was closed") from None

    second, control = Plain(Reply(text="never")), Control()
    with anyio.CancelScope() as scope:
        scope.deadline = anyio.current_time() + 0.05
        await FallbackModel(Mistranslates(Reply(), delay=5), second).respond(question(control))
    assert scope.cancelled_caught
    assert (second.asked, control.charged) == (0, 0)


async def test_an_answer_that_is_no_reply_is_called_that():
    with pytest.raises(InvalidArguments, match="no Reply"):
        await FallbackModel(Plain(None), Plain(Reply(text="never"))).respond(question())  # type: ignore[arg-type]


# ---- all at once


async def test_the_fastest_of_a_race_answers_and_the_others_are_hung_up_on(ask: Asked, endpoint: StartEndpoint):
    slow, hanging = endpoint(answers.text("late", delay=5)), endpoint(answers.hang())
    # Not before all have been asked: a race that is over asks nobody any more.
    fast = endpoint(answers.text("first", delay=0.3))
    control = Control()
    with anyio.fail_after(3):
        reply = await ask(RaceModel(at(slow), at(fast), at(hanging)), control)
    assert reply.text == "first"
    ask.assert_showed("first")
    assert control.charged == 2
    for loser in (slow, hanging):
        await in_thread(loser.wait_for_disconnects, 1)
        await in_thread(loser.wait_until_closed)


async def test_a_failure_wins_no_race(ask: Asked, endpoint: StartEndpoint):
    failing, good = endpoint(answers.failure(500)), endpoint(answers.text("good", delay=0.2))
    assert (await ask(RaceModel(at(failing), at(good)))).text == "good"
    ask.assert_showed("good")


async def test_an_empty_reply_wins_only_if_there_is_no_better_one(ask: Asked, endpoint: StartEndpoint):
    empty = endpoint(answers.empty())
    good, failing = endpoint(answers.text("good", delay=0.2)), endpoint(answers.failure(500))
    assert (await ask(RaceModel(at(empty), at(good)))).text == "good"
    assert (await ask(RaceModel(at(failing), at(empty)))).text is None


async def test_when_all_lose_the_error_has_their_failures_in_the_models_order(ask: Asked, endpoint: StartEndpoint):
    late = answers.failure(400, "late")
    first, second = endpoint(answers.Answer(status=400, error=late.error, delay=0.2)), endpoint(answers.failure(500))
    with pytest.raises(AllModelsFailed) as caught:
        await ask(RaceModel(at(first), at(second)))
    assert [type(error) for error in caught.value.errors] == [StatusError, ServerError]


async def test_who_shows_the_first_piece_has_won_even_if_another_would_end_sooner(endpoint: StartEndpoint):
    steady = endpoint(answers.text("the steady one wins", chunk_delay=0.1))
    sudden = endpoint(answers.text("late", delay=0.35))
    ask = Asked(streams=True)
    reply = await ask(RaceModel(at(sudden), at(steady)))
    assert reply.text == "the steady one wins"
    ask.assert_showed(reply.text)
    await in_thread(sudden.wait_for_disconnects, 1)


async def test_a_winner_that_breaks_off_is_an_error(endpoint: StartEndpoint):
    broken = endpoint(answers.cut("one two three four five six"))
    slow = endpoint(answers.text("never", delay=5))
    ask = Asked(streams=True)
    with anyio.fail_after(3), pytest.raises(ConnectionFailed):
        await ask(RaceModel(at(slow), at(broken)))
    assert ask.pieces


async def test_two_models_that_write_at_once_are_not_mixed():
    ask = Asked(streams=True)
    reply = await ask(RaceModel(Pieces("a", "b", "c"), Pieces("x", "y", "z")))
    ask.assert_showed(reply.text)


async def test_a_model_that_shields_its_stream_does_not_show_more_after_it_has_lost():
    class Shielded(Pieces):
        async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
            with anyio.CancelScope(shield=True):
                return await super().stream(request, sink)

    ask = Asked(streams=True)
    reply = await ask(RaceModel(Pieces("a"), Shielded("x", "y", delay=0.02)))
    assert (reply.text, ask.pieces) == ("a", ["a"])


async def test_a_reply_of_tool_calls_alone_wins_a_race_without_showing_a_piece():
    reply = Reply(tool_calls=(ToolCall("1", "add", "{}"),))
    ask, slow = Asked(streams=True), Plain(Reply(text="late"), delay=5)
    assert await ask(RaceModel(slow, Plain(reply, delay=0.01))) is reply
    assert (ask.pieces, slow.cancelled) == ([], 1)


async def test_a_race_that_is_over_at_once_asks_nobody_else():
    class AtOnce(Plain):
        async def respond(self, request: ModelRequest) -> Reply:
            self.asked += 1
            return Reply(text="at once")

    models = AtOnce(Reply()), AtOnce(Reply())
    assert (await RaceModel(*models).respond(question())).text == "at once"
    assert sum(model.asked for model in models) == 1


async def test_a_mistake_in_one_model_ends_the_race_and_comes_out_as_it_is():
    other = Plain(Reply(text="late"), delay=5)
    with anyio.fail_after(3), pytest.raises(ZeroDivisionError):
        await RaceModel(other, Plain(ZeroDivisionError(), delay=0.01)).respond(question())
    assert other.cancelled == 1


@pytest.mark.parametrize("requests", [1, 2, 3, 4])
async def test_a_race_never_sends_more_than_the_budget_has(requests: int, endpoint: StartEndpoint):
    field = [endpoint(answers.failure(400)) for _ in range(3)]
    agent = BaseAgent("A", "a", client=RaceModel(*map(at, field)))
    result = await agent.run("go", limits=Limits(max_requests=requests))
    assert [len(one.requests) for one in field] == [1, *(int(requests > n) for n in (1, 2))]
    assert result.usage.requests == min(requests, 3)
    assert isinstance(result.exception, AllModelsFailed if requests > 1 else StatusError)


async def test_a_tree_of_runs_that_race_stays_within_its_budget(endpoint: StartEndpoint):
    one, two = endpoint(answers.text("a", delay=0.02)), endpoint(answers.failure(400))
    calls = [answers.call(f"delegate_to_d{n}", {"query": "?"}) for n in range(5)]
    boss = BaseAgent("Boss", "b", client=at(endpoint(calls_then("done", *calls))))
    for n in range(5):
        model = RaceModel(FallbackModel(at(two), at(one)), at(one))
        boss.register_delegate(BaseAgent(f"D{n}", "d", client=model))
    result = await boss.run("go", limits=Limits(max_requests=8))
    assert len(one.requests) + len(two.requests) <= 7
    assert result.usage.requests <= 8


# ---- in turn


async def test_no_more_requests_than_allowed_are_on_their_way(endpoint: StartEndpoint):
    one = endpoint(answers.text("ok", delay=0.02))
    inner = Watched(at(one))
    agent = BaseAgent("A", "a", client=LimitedModel(inner, max_concurrency=2))
    async with anyio.create_task_group() as group:
        for _ in range(9):
            group.start_soon(agent.run, "go")
    assert (len(one.requests), inner.most) == (9, 2)


async def test_a_streamed_reply_has_its_place_until_it_is_whole(endpoint: StartEndpoint):
    one = endpoint(answers.text("a b c d e", chunk_delay=0.02))
    inner = Watched(at(one))
    model = LimitedModel(inner, max_concurrency=1)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(Asked(streams=True), model)
    assert (len(one.requests), inner.most) == (3, 1)


async def test_a_request_that_fails_gives_its_place_back(ask: Asked, endpoint: StartEndpoint):
    one = endpoint([answers.failure(503), "ok"])
    model = LimitedModel(at(one), max_concurrency=1)
    with pytest.raises(ServerError):
        await ask(model)
    with anyio.fail_after(3):
        assert (await ask(model)).text == "ok"


def in_threads(function: Callable[[], Awaitable[None]], *backends: str) -> None:
    """Run a function in event loops side by side."""
    threads = [threading.Thread(target=partial(anyio.run, function, backend=backend)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_a_rate_holds_over_event_loops_in_several_threads(endpoint: StartEndpoint):
    one = endpoint("ok")
    inner = Watched(at(one))
    model = LimitedModel(inner, rate=(3, 0.3))

    async def ask_five_times() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(model.respond, question())

    in_threads(ask_five_times, "asyncio", "trio")
    assert len(one.requests) == 10
    # Three at once and then three more each 0.3 s, less what a busy machine takes between a turn and its note; a rate
    # for each loop would need 0.3 s in all.
    assert max(inner.times) - min(inner.times) >= 0.6


def test_a_place_given_back_in_one_event_loop_lets_a_request_of_another_one_go(endpoint: StartEndpoint):
    one = endpoint(answers.text("ok", delay=0.02))
    inner = Watched(at(one))
    model = LimitedModel(inner, max_concurrency=1)

    async def ask_five_times() -> None:
        for _ in range(5):
            await model.respond(question())

    in_threads(ask_five_times, "asyncio", "trio", "trio")
    assert (len(one.requests), inner.most) == (15, 1)


class Noting:
    """A model that notes who asks it, and when."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.times: list[float] = []
        self.began = anyio.current_time()

    async def respond(self, request: ModelRequest) -> Reply:
        self.asked.append(request.model)
        self.times.append(round(anyio.current_time() - self.began, 6))
        return Reply(text="ok")


async def ask_in_order(model: Model, *, at_times: Sequence[float]) -> list[str]:
    """Ask at these times; who asked, in this order."""
    order: list[str] = []

    async def ask(name: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        order.append(name)
        await model.respond(replace(question(), model=name))

    async with anyio.create_task_group() as group:
        for number, seconds in enumerate(at_times):
            group.start_soon(ask, f"{number}", seconds)
    return order


@virtual_time
@pytest.mark.parametrize(
    ("rate", "at_times", "expected"),
    [
        ((1, 10), [0, 0, 0], [0, 10, 20]),
        ((2, 10), [0, 0, 0, 0, 0, 0], [0, 0, 10, 10, 20, 20]),
        ((2, 10), [0, 9, 9, 9], [0, 9, 10, 19]),
        ((3, 1), [0, 5, 5, 5, 5], [0, 5, 5, 5, 6]),
    ],
)
async def test_requests_begin_in_the_order_they_came_as_soon_as_the_rate_lets_them(
    rate: tuple[int, float], at_times: list[float], expected: list[float]
):
    inner = Noting()
    order = await ask_in_order(LimitedModel(inner, rate=rate), at_times=at_times)
    assert (inner.asked, inner.times) == (order, expected)


@virtual_time
async def test_a_wait_that_cannot_end_in_time_is_not_begun():
    inner = Noting()
    model = LimitedModel(inner, rate=(1, 10))
    refused: list[DeadlineWouldPass] = []

    async def fourth() -> None:
        await anyio.sleep(1)
        with pytest.raises(DeadlineWouldPass) as caught, anyio.fail_after(28):
            await model.respond(question())
        assert anyio.current_time() == inner.began + 1
        refused.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(fourth)
        await ask_in_order(model, at_times=[0, 0, 0])
    assert (refused[0].wait, refused[0].remaining) == (pytest.approx(29), 28)
    assert inner.times == [0, 10, 20]


@virtual_time
async def test_those_who_wait_for_a_place_are_ahead_in_the_rate_too():
    model = LimitedModel(Plain(Reply(text="ok"), delay=1), max_concurrency=1, rate=(1, 10))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(model.respond, question())
            await anyio.wait_all_tasks_blocked()
        with pytest.raises(DeadlineWouldPass) as caught, anyio.fail_after(25):
            await model.respond(question())
    assert caught.value.wait == pytest.approx(30)


@virtual_time
@pytest.mark.parametrize("limit", [{"rate": (1, 10)}, {"rate": (1, 10), "max_concurrency": 1}])
async def test_who_gives_up_waiting_makes_room_for_those_behind(limit: dict[str, Any]):
    inner = Noting()
    model = LimitedModel(inner, **limit)
    await model.respond(question())

    async def impatient() -> None:
        with anyio.CancelScope() as scope:
            scope.deadline = anyio.current_time() + 1000
            group.start_soon(cut, scope)
            await model.respond(question())
        assert scope.cancelled_caught

    async def cut(scope: anyio.CancelScope) -> None:
        await anyio.sleep(5)
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(impatient)
        await anyio.wait_all_tasks_blocked()
        await ask_in_order(model, at_times=[0, 0])
    assert inner.times == [0, 10, 20]


@virtual_time
async def test_waiting_in_turn_is_no_time_of_the_request():
    model = LimitedModel(Plain(Reply(text="ok"), delay=4), rate=(1, 60))
    agent = BaseAgent("A", "a", client=model, limits=Limits(request_timeout=5))
    began = anyio.current_time()
    assert (await agent.run("go")).success
    assert (await agent.run("go")).success
    assert anyio.current_time() - began == pytest.approx(64)
    too_slow = BaseAgent("A", "a", client=LimitedModel(Plain(Reply(), delay=6), rate=(1, 60)), limits=agent.limits)
    result = await too_slow.run("go", max_retries=0)
    assert isinstance(result.exception, RequestTimedOut)


@virtual_time
async def test_the_time_of_a_race_stands_still_while_one_of_its_models_waits_in_turn():
    async def busy_for(seconds: float) -> Model:
        model = LimitedModel(Plain(Reply(text="never"), delay=100), rate=(1, seconds))
        with anyio.move_on_after(0):
            await model.respond(question())
        return model

    async def seconds_of(*models: Model) -> float:
        agent = BaseAgent("A", "a", client=RaceModel(*models), limits=Limits(request_timeout=5))
        began = anyio.current_time()
        result = await agent.run("go", max_retries=0)
        assert isinstance(result.exception, RequestTimedOut)
        return round(anyio.current_time() - began, 6)

    hanging = Plain(Reply(text="never"), delay=1000)
    assert await seconds_of(hanging, hanging) == 5
    assert await seconds_of(hanging, await busy_for(60)) == 65
    # For two that wait, the clock goes on when neither does any more.
    assert await seconds_of(await busy_for(20), await busy_for(30)) == 35


@virtual_time
@pytest.mark.parametrize("after", [None, 5])
async def test_a_turn_that_would_come_too_late_makes_the_next_model_answer_at_once(after: float | None):
    busy = LimitedModel(Plain(Reply(text="first")), rate=(1, 60))
    model = FallbackModel(busy, Plain(Reply(text="second")), after=after)
    agent = BaseAgent("A", "a", client=model, timeout=None if after else 30)
    began = anyio.current_time()
    assert [(await agent.run("go")).content for _ in range(2)] == ["first", "second"]
    assert anyio.current_time() == began


@virtual_time
@pytest.mark.parametrize("combine", [FallbackModel, RaceModel])
async def test_turns_that_all_come_too_late_are_a_matter_of_the_deadline(combine: Combine):
    first, second = (LimitedModel(Plain(Reply(text="ok")), rate=(1, 60)) for _ in range(2))
    for model in (first, second):
        await model.respond(question())
    result = await BaseAgent("A", "a", client=combine(first, second)).run("go", timeout=30)
    assert (result.stop_reason, type(result.exception)) == ("deadline", DeadlineWouldPass)


# ---- cut


When = Callable[[], Awaitable[object]]


async def by_scope(ask: When, when: When) -> None:
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            group.start_soon(after, when, scope.cancel)
            await ask()
        assert scope.cancelled_caught


async def by_native_timeout(ask: When, when: When) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            cutter = asyncio.ensure_future(after(when, partial(timeout.reschedule, 0)))
            await ask()
    await cutter


async def by_two_cancels(ask: When, when: When) -> None:
    task = asyncio.ensure_future(ask())
    await when()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # a second one while the first is being obeyed
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_trio_scope(ask: When, when: When) -> None:
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(after, when, scope.cancel)
            await ask()
        assert scope.cancelled_caught


async def after(when: When, act: Callable[[], object]) -> None:
    await when()
    act()


Cut = Callable[[When, When], Awaitable[None]]


@pytest.fixture(params=[by_scope, by_native_timeout, by_two_cancels, by_trio_scope])
def cut(request: pytest.FixtureRequest, anyio_backend: tuple[str, object]) -> Cut:
    needs = {by_native_timeout: "asyncio", by_two_cancels: "asyncio", by_trio_scope: "trio"}.get(request.param)
    if needs not in (None, anyio_backend[0]):
        pytest.skip(f"only on {needs}")
    return request.param


COMBINATIONS: dict[str, Callable[[Model, Model], Model]] = {
    "fallback": lambda failing, hanging: FallbackModel(failing, hanging),
    "fallback, at the first": lambda failing, hanging: FallbackModel(hanging, failing, after=60),
    "race": lambda failing, hanging: RaceModel(failing, hanging, hanging),
    "limited": lambda failing, hanging: LimitedModel(hanging, max_concurrency=1, rate=(9, 1)),
    "nested": lambda failing, hanging: FallbackModel(
        failing, RaceModel(LimitedModel(hanging, max_concurrency=1), FallbackModel(failing, hanging))
    ),
}


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
async def test_a_cut_leaves_no_task_and_no_connection(
    combine: Callable[[Model, Model], Model], cut: Cut, ask: Asked, endpoint: StartEndpoint
):
    failing = endpoint(answers.failure(500))
    # A stream is cut in the middle of its text, a whole answer before it begins.
    slow = endpoint(answers.text("a " * 100, chunk_delay=0.05) if ask.streams else answers.hang())
    model = combine(at(failing), at(slow))
    tasks = {task.id for task in running_tasks()}
    await cut(partial(ask, model), ask.began.wait if ask.streams else partial(in_thread, slow.wait_for_requests, 1))
    assert {task.id for task in running_tasks()} <= tasks
    await in_thread(slow.wait_for_disconnects, len(slow.requests))
    await in_thread(slow.wait_until_closed)


@pytest.mark.parametrize("limit", [{"max_concurrency": 1}, {"max_concurrency": 1, "rate": (2, 0.1)}], ids=str)
async def test_a_cut_gives_back_the_place_and_that_in_the_line(
    limit: dict[str, Any], cut: Cut, endpoint: StartEndpoint
):
    one = endpoint([answers.hang(), "ok", "ok", "ok"])
    model = LimitedModel(at(one), **limit)

    async def three() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(model.respond, question())

    await cut(three, partial(in_thread, one.wait_for_requests, 1))
    assert len(one.requests) == 1
    with anyio.fail_after(3):
        await three()
    assert (len(one.requests), one.answers_left) == (4, 0)


async def test_a_race_cut_from_a_blocking_caller_hangs_up(endpoint: StartEndpoint):
    one, two = endpoint(answers.hang()), endpoint(answers.hang())
    agent = BaseAgent("A", "a", client=RaceModel(at(one), at(two)))
    result = await in_thread(lambda: sync.run(agent, "go", timeout=0.3))
    assert result.stop_reason == "deadline"
    for endpoint_ in (one, two):
        await in_thread(endpoint_.wait_for_disconnects, 1)


# ---- in each other


async def test_combinations_combine(ask: Asked, endpoint: StartEndpoint):
    bad, worse, slow, good = (
        endpoint(answers.failure(503)),
        endpoint(answers.nothing()),
        endpoint(answers.text("slow", delay=5)),
        endpoint("good"),
    )
    model = FallbackModel(
        RaceModel(LimitedModel(at(bad), rate=(9, 1)), FallbackModel(at(worse), at(bad))),
        LimitedModel(RaceModel(at(slow), at(good)), max_concurrency=1),
    )
    control = Control()
    with anyio.fail_after(3):
        reply = await ask(model, control)
    assert reply.text == "good"
    ask.assert_showed("good")
    assert [len(one.requests) for one in (bad, worse)] == [2, 1]
    assert control.charged == 4
    everything = FallbackModel(model.models[0], at(worse))
    with pytest.raises(AllModelsFailed) as caught:
        await ask(everything)
    assert isinstance(caught.value.errors[0], AllModelsFailed)
    assert pickle.loads(pickle.dumps(caught.value)).errors[0].errors[1].errors[1].status == 503


async def test_a_race_goes_on_when_one_part_of_it_has_spent_the_budget(ask: Asked, endpoint: StartEndpoint):
    bad, good = endpoint(answers.failure(500)), endpoint(answers.text("good", delay=0.2))
    model = RaceModel(FallbackModel(at(bad), at(bad)), at(good))
    assert (await ask(model, Control(left=1))).text == "good"
    assert len(bad.requests) == 1
    worst = RaceModel(FallbackModel(at(bad), at(bad)), at(bad))
    with pytest.raises(BudgetExceeded):
        await ask(worst, Control(left=1))


async def test_a_combination_streams_through_a_run(endpoint: StartEndpoint):
    model = FallbackModel(at(endpoint(answers.failure(500))), RaceModel(at(endpoint("a b c")), at(endpoint("a b c"))))
    agent = BaseAgent("A", "a", client=model)
    async with agent.stream("go") as stream:
        pieces = [event.text async for event in stream if event.kind == "text_delta"]
        result = await stream.result()
    assert (pieces, result.content) == (["a ", "b ", "c"], "a b c")


async def test_tools_work_with_a_combination(endpoint: StartEndpoint):
    one = endpoint(calls_then("3", answers.call("add", {"a": 1, "b": 2})))
    agent = BaseAgent("A", "a", client=RaceModel(at(one), at(one)))
    agent.add_tool(lambda a, b: a + b, name="add")
    assert (await agent.run("1 + 2")).content == "3"


def test_one_combination_serves_one_event_loop_after_the_other(endpoint: StartEndpoint):
    one, bad = endpoint("ok"), endpoint(answers.failure(500))
    agent = BaseAgent("A", "a", client=LimitedModel(FallbackModel(at(bad), at(one)), max_concurrency=1, rate=(99, 9)))
    contents = [anyio.run(agent.run, "go", backend=kind).content for kind in ("asyncio", "trio", "asyncio")]
    assert [*contents, agent.run_sync("go").content] == ["ok"] * 4


# ---- closing


async def test_closing_a_combination_closes_what_its_models_opened(ask: Asked, endpoint: StartEndpoint):
    one, two = endpoint("ok"), endpoint("ok")
    last = Plain(Reply())
    model = FallbackModel(LimitedModel(at(one), max_concurrency=1), at(two), last)
    await ask(model)
    await ask(model.models[1])
    assert one.connections + two.connections == 2
    await model.aclose()
    await in_thread(one.wait_until_closed)
    await in_thread(two.wait_until_closed)
    assert last.closed == 1
    assert (await ask(model)).text == "ok"


async def test_a_model_that_fails_to_close_keeps_no_other_open():
    class Stuck(Plain):
        async def aclose(self) -> None:
            raise OSError("stuck")

    models = Plain(Reply()), Stuck(Reply()), Plain(Reply())
    with pytest.raises(OSError, match="stuck"):
        await RaceModel(*models).aclose()
    assert [model.closed for model in models] == [1, 0, 1]


async def test_leaving_an_agent_closes_what_its_combination_opened(endpoint: StartEndpoint):
    one = endpoint("ok")
    async with BaseAgent("A", "a", client=RaceModel(at(one), at(one))) as agent:
        await agent.run("go")
        assert one.connections
    await in_thread(one.wait_until_closed)
