"""Hooks around requests: whoever registers them and however a run is begun, no request goes past them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from fractal import (
    AgentResult,
    Around,
    BaseAgent,
    BudgetExceeded,
    Delta,
    InvalidArguments,
    InvalidMessages,
    Limits,
    ModelError,
    ModelRequest,
    NextRequest,
    PendingRequest,
    Reply,
    RequestTimedOut,
    RunContext,
    StatusError,
    ToolCall,
    UnexpectedError,
    sync,
)
from fractal.model import Sink
from fractal.testing import Endpoint, ScriptedModel, answers
from tests.hooked import OF_HOOKS, RUNS, Looks, agent_of
from tests.support import assert_continuable, shown
from tests.without_uvloop import anyio_backend  # noqa: F401

KINDS: list[Any] = [BaseAgent, sync.BaseAgent]
StartEndpoint = Callable[..., Endpoint]


def async_hook(seen: list[Any]) -> Any:
    async def hook(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        reply = await next(request.replace(temperature=0.25))
        seen.append((len(request.messages), reply.text))
        return reply

    return hook


def plain_hook(seen: list[Any]) -> Any:
    def hook(ctx: RunContext[Any], request: PendingRequest, next: Any) -> Reply:
        reply: Reply = next(request.replace(temperature=0.25))
        seen.append((len(request.messages), reply.text))
        return reply

    return hook


def handed_on_hook(seen: list[Any]) -> Any:
    inner = async_hook(seen)
    return lambda ctx, request, next: inner(ctx, request, next)


def temperatures(agent: Any) -> list[Any]:
    return [request.body.get("temperature") for request in agent.client.requests]


# ---- whoever registers one, and however a run is begun


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("register", OF_HOOKS, ids=shown)
@pytest.mark.parametrize("kind", KINDS, ids=shown)
async def test_a_hook_is_around_the_requests_of_every_run(
    kind: Any, register: Callable[..., Any], begin: Callable[..., Awaitable[AgentResult]]
):
    seen: list[Any] = []

    def make(of: Any = kind, **options: Any) -> Any:
        return agent_of(Looks(), of, **options)

    agent, options = register(make, "around_model", async_hook(seen))
    with anyio.fail_after(30):
        result = await begin(agent, options)
    assert result.content == "done"
    assert seen == [(1, None), (3, "done")]
    assert temperatures(agent) == [0.25, 0.25]


@pytest.mark.parametrize("begin", RUNS, ids=shown)
@pytest.mark.parametrize("form", [plain_hook, handed_on_hook], ids=shown)
async def test_a_hook_may_be_plain(form: Callable[..., Any], begin: Callable[..., Awaitable[AgentResult]]):
    seen: list[Any] = []
    agent = agent_of(Looks(), around_model=form(seen))
    with anyio.fail_after(30):
        result = await begin(agent, {})
    assert (result.content, seen, temperatures(agent)) == ("done", [(1, None), (3, "done")], [0.25, 0.25])


@pytest.mark.parametrize("delegates", [False, True])
async def test_a_hook_holds_in_delegates_by_choice_outside_of_their_own(delegates: bool):
    seen: list[str] = []

    def named(name: str) -> Any:
        async def hook(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
            seen.append(f"{name} at {ctx.depth}")
            return await next()

        return hook

    child = agent_of(Looks(), client=ScriptedModel(lambda request: "deep"), around_model=named("own"))
    ask = ScriptedModel([answers.call("delegate_to_a", {"query": "go"}), "done"])
    above = BaseAgent("Above", "You ask.", client=ask, around_model=[Around(named("above"), delegates=delegates)])
    await above.register_delegate(child).run("go")
    below = ["above at 1", "own at 1"] if delegates else ["own at 1"]
    assert seen == ["above at 0", *below, "above at 0"]


# ---- what is sent


async def sent_by(hook: Any, **options: Any) -> tuple[AgentResult, list[dict[str, Any]]]:
    agent = agent_of(Looks(), around_model=hook, **options)
    result: AgentResult = await agent.run("go")
    assert_continuable(result)
    return result, [request.body for request in agent.client.requests]


async def test_a_hook_changes_what_one_request_sends_and_nothing_else():
    async def change(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        if len(request.messages) > 1:
            return await next()
        assert (request.model, request.system, request.temperature) == ("gpt-4o-mini", "You look.", None)
        changed = request.replace(
            model="large",
            system="You look well.",
            messages=[{"role": "user", "content": "[name]"}],
            max_tokens=7,
            reasoning_effort="low",
            extra_body={"top_p": 0.5},
        )
        return await next(changed)

    result, [first, second] = await sent_by(change)
    assert first["messages"] == [
        {"role": "system", "content": "You look well."},
        {"role": "user", "content": "[name]"},
    ]
    facts = ("model", "max_tokens", "reasoning_effort", "top_p")
    assert [first[name] for name in facts] == ["large", 7, "low", 0.5]
    assert [second.get(name) for name in facts] == ["gpt-4o-mini", None, None, None]
    assert second["messages"][:2] == [{"role": "system", "content": "You look."}, {"role": "user", "content": "go"}]
    assert result.messages[0] == {"role": "user", "content": "go"}


async def test_what_is_done_to_the_messages_of_a_request_is_sent_and_stays_out_of_the_transcript():
    async def change(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        request.messages[0]["content"] = "[masked]"
        request.tools[0]["function"]["description"] = "Look twice."
        return await next()

    result, bodies = await sent_by(change)
    assert [body["messages"][1]["content"] for body in bodies] == ["[masked]", "[masked]"]
    assert [body["tools"][0]["function"]["description"] for body in bodies] == ["Look twice.", "Look twice."]
    assert result.messages[0]["content"] == "go"


async def test_the_events_tell_what_was_sent():
    async def change(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        masked = request.replace(messages=[{"role": "user", "content": "[masked]"}], model="large", tools=[])
        return await next(masked if len(request.messages) == 1 else None)

    events: list[Any] = []
    await sent_by(change, observers=[events.append], client=ScriptedModel(["", answers.call("look", {"n": 1}), "done"]))
    first, again, second = (event for event in events if event.kind == "model_requested")
    told = {"role": "system", "content": "You look."}, {"role": "user", "content": "[masked]"}
    assert (first.opening, first.kept, first.message_count, first.model, first.tools) == ([*told], [], 1, "large", [])
    assert (again.opening, again.added) == ([*told], [])
    assert (second.opening, second.kept, second.model, second.tools) == ([told[0]], None, "gpt-4o-mini", ["look"])
    assert [message["role"] for message in second.added] == ["assistant", "tool"]


async def test_hooks_in_each_other_see_what_the_outer_one_has_changed():
    def add(word: str) -> Any:
        async def hook(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
            return await next(request.replace(system=f"{request.system} {word}"))

        return hook

    _, bodies = await sent_by([add("one"), add("two")])
    assert {body["messages"][0]["content"] for body in bodies} == {"You look. one two"}


async def test_a_tool_that_a_hook_leaves_out_is_not_offered_and_cannot_be_called():
    async def without(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        return await next(request.replace(tools=[]) if len(request.messages) == 1 else request)

    looks = Looks()
    agent = agent_of(looks, around_model=without)
    result = await agent.run("go")
    assert [body.body.get("tools") is None for body in agent.client.requests] == [True, False]
    assert looks.calls == []
    assert "there is no tool 'look'" in (result.tool_results[0].error or "")
    await agent.run("go", around_model=lambda ctx, request, next: next(request.replace(tools=request.tools)))
    assert looks.calls == []


REFUSED = answers.Answer(status=400, error={"message": "not here", "param": "response_format"})


async def test_all_else_that_a_run_wants_is_still_asked_for():
    async def change(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        assert [tool["function"]["name"] for tool in request.tools] == ["look"]
        return await next(request.replace(system="Other.", tools=request.tools))

    def reply(request: Any) -> Any:
        if "response_format" in request.body:
            return REFUSED
        return answers.call("final_answer", {"result": 3})

    agent = agent_of(Looks(), client=ScriptedModel(reply), around_model=change)
    result = await agent.run("go", output_type=int)
    assert result.content == 3
    first, second = (request.body for request in agent.client.requests)
    assert first["messages"][0]["content"] == "Other."
    assert second["messages"][0]["content"].startswith("Other.\n\n")
    assert [tool["function"]["name"] for tool in second["tools"]] == ["look", "final_answer"]


async def test_a_request_is_shown_and_sent_as_the_context_window_leaves_it():
    counts: list[int] = []

    async def look_on(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        counts.append(len(request.messages))
        return await next()

    async def cut(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        return await next(request.replace(messages=request.messages[-1:]))

    history = [{"role": role, "content": "x" * 400} for role in ("user", "assistant") * 4]
    agent = agent_of(Looks(), client=ScriptedModel(lambda r: "ok"), around_model=look_on, context_window=600)
    agent.compact = lambda messages: "what was before"
    await agent.run("go", messages=history)
    await agent.run("go", messages=history, around_model=cut)
    whole, short = (request.body["messages"] for request in agent.client.requests)
    assert counts[0] == counts[1] < 9
    assert len(whole) == counts[0] + 1
    assert [message["role"] for message in short] == ["system", "user"]
    assert all("what was before" in messages[0]["content"] for messages in (whole, short))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": ""}, InvalidArguments, "model"),
        ({"system": 3}, InvalidArguments, "system=3"),
        ({"messages": "hi"}, InvalidArguments, "messages='hi'"),
        ({"messages": [{"role": "nobody"}]}, InvalidMessages, "unknown role"),
        ({"tools": [{"name": "x"}]}, InvalidArguments, "tools="),
        ({"temperature": "hot"}, InvalidArguments, "temperature="),
        ({"max_tokens": 0}, InvalidArguments, "max_tokens=0"),
        ({"extra_body": {"messages": []}}, InvalidArguments, "extra_body"),
        ({"top_p": 1}, InvalidArguments, "a request has no top_p, only extra_body, max_tokens, messages"),
    ],
    ids=shown,
)
async def test_a_request_that_cannot_be_sent_is_refused(changes: dict[str, Any], kind: Any, words: str):
    async def change(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        return await next(request.replace(**changes))

    agent = agent_of(Looks(), around_model=change)
    with pytest.raises(kind, match=words):
        await agent.run("go")
    assert agent.client.requests == []


# ---- who answers


@pytest.mark.parametrize("answer", ["cached", Reply(text="cached", input_tokens=5)], ids=shown)
async def test_a_hook_may_answer_without_a_request(answer: Any):
    async def cached(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Any:
        return answer

    agent = agent_of(Looks(), around_model=cached, limits=Limits(max_requests=0, max_tokens=0))
    result = await agent.run("go")
    assert (result.content, result.usage.requests, agent.client.requests) == ("cached", 0, [])
    async with agent.stream("go") as stream:
        assert [piece async for piece in stream.text()] == ["cached"]
    assert (await stream.result()).content == "cached"


async def test_an_answer_of_a_hook_may_be_kept_and_given_again():
    kept: dict[str, Reply] = {}

    async def cache(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        key = repr((request.model, request.system, request.messages))
        if key not in kept:
            kept[key] = await next()
        return kept[key]

    looks = Looks()
    agent = agent_of(looks, around_model=cache)
    first, second = [await agent.run("go") for _ in range(2)]
    assert first.messages == second.messages
    assert (looks.calls, len(agent.client.requests)) == ([1, 1], 2)
    assert (first.usage.requests, second.usage.requests) == (2, 0)


async def test_a_hook_may_ask_another_model_when_one_fails_and_each_request_is_counted():
    async def fall_back(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        try:
            return await next()
        except StatusError:
            return await next(request.replace(model="small"))

    def reply(request: Any) -> Any:
        return "from small" if request.body["model"] == "small" else answers.failure(400, "no")

    agent = agent_of(Looks(), client=ScriptedModel(reply), around_model=fall_back)
    result = await agent.run("go")
    assert (result.content, result.usage.requests) == ("from small", 2)
    result = await agent.run("go", limits=Limits(max_requests=1))
    assert isinstance(result.exception, BudgetExceeded)


async def test_a_hook_is_around_the_retries_of_a_request():
    seen: list[Any] = []
    script = ScriptedModel([answers.failure(503, "busy", retry_after=0.001), "done"])
    agent = agent_of(Looks(), client=script, around_model=async_hook(seen))
    assert (await agent.run("go")).content == "done"
    assert (seen, temperatures(agent)) == ([(1, "done")], [0.25, 0.25])


async def test_a_hook_may_change_the_reply_and_its_calls():
    async def other(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Any:
        await next()
        return None if len(request.messages) > 1 else asking

    asking = Reply(tool_calls=(ToolCall("c9", "look", '{"n": 9}'),))
    looks = Looks()
    result = await agent_of(looks, around_model=other).run("go")
    assert (result.content, looks.calls, result.tool_results[0].call_id) == ("done", [9], "c9")


@pytest.mark.parametrize("answer", [None, 3, {"text": "x"}], ids=shown)
async def test_what_is_no_reply_is_refused(answer: Any):
    async def odd(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Any:
        return answer

    with pytest.raises(InvalidArguments, match="hook 'odd' around requests returned"):
        await agent_of(Looks(), around_model=odd).run("go")


async def test_what_a_hook_raises_ends_the_run_as_if_the_model_had_raised_it():
    async def wrong(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        raise ZeroDivisionError("odd")

    def down(ctx: RunContext[Any], request: PendingRequest, next: Any) -> Reply:
        raise ModelError("down", status=418)

    result = await agent_of(Looks(), around_model=wrong).run("go")
    assert isinstance(result.exception, UnexpectedError)
    assert isinstance(result.exception.__cause__, ZeroDivisionError)
    result = await agent_of(Looks(), around_model=down).run("go")
    assert (result.stop_reason, result.error) == ("model_error", "down")


# ---- next


async def test_next_is_called_one_after_the_other_and_not_after_the_end():
    kept: list[NextRequest] = []
    begun = anyio.Event()

    class Slow:
        async def respond(self, request: ModelRequest) -> Reply:
            begun.set()
            await anyio.sleep(0.02)
            return Reply(text="done")

    async def both(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        kept.append(next)
        async with anyio.create_task_group() as group:
            group.start_soon(next)
            await begun.wait()
            with pytest.raises(InvalidArguments, match="one after the other"):
                await next()
        with pytest.raises(InvalidArguments, match="give the request, or nothing"):
            await next("go")  # type: ignore[arg-type]
        return await next()

    result = await agent_of(Looks(), client=Slow(), around_model=both).run("go")
    assert (result.content, result.usage.requests) == ("done", 2)
    with pytest.raises(InvalidArguments, match="after the hook had ended"):
        await kept[0]()


class Speaking:
    """A model that streams some words, and then may fail."""

    def __init__(self, *ends: Exception | None) -> None:
        self.ends = list(ends)

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError("it is streamed")

    async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
        for word in ("so ", "it ", "is"):
            await sink(Delta("text", word))
            await anyio.sleep(0)
        end = self.ends.pop(0) if self.ends else None
        if end is not None:
            raise end
        return Reply(text="so it is")


async def text_of(agent: BaseAgent) -> tuple[list[str], AgentResult]:
    async with agent.stream("go") as stream:
        pieces = [piece async for piece in stream.text()]
    return pieces, await stream.result()


async def test_the_reply_is_streamed_through_the_hooks():
    seen: list[Any] = []
    hooks = [async_hook(seen), plain_hook(seen)]
    pieces, result = await text_of(agent_of(Looks(), client=Speaking(), around_model=hooks))
    assert (pieces, result.content, len(seen)) == (["so ", "it ", "is"], "so it is", 2)
    assert result.warnings == []


async def test_after_the_first_piece_a_failure_is_final_for_hooks_too():
    async def insist(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        for _ in range(3):
            try:
                return await next()
            except ModelError:
                pass
        return await next()

    pieces, result = await text_of(agent_of(Looks(), client=Speaking(ModelError("broke off")), around_model=insist))
    assert (pieces, result.error) == (["so ", "it ", "is"], "broke off")


async def test_a_streamed_request_that_a_hook_has_cut_is_not_sent_again():
    class Hanging(Speaking):
        async def stream(self, request: ModelRequest, sink: Sink) -> Reply:
            await sink(Delta("text", "so "))
            await anyio.sleep(60)
            raise AssertionError

    async def hurry(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        with anyio.move_on_after(0.02):
            return await next()
        return await next(request.replace(model="fast"))

    pieces, result = await text_of(agent_of(Looks(), client=Hanging(), around_model=hurry))
    assert pieces == ["so "]
    assert isinstance(result.exception, RequestTimedOut)


async def test_a_reply_with_another_text_than_was_streamed_is_warned_of():
    async def mask(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        return Reply(text=((await next()).text or "").replace("it", "**"))

    pieces, result = await text_of(agent_of(Looks(), client=Speaking(), around_model=mask))
    assert (pieces, result.content) == (["so ", "it ", "is"], "so ** is")
    assert [warning for warning in result.warnings if "another text" in warning]


async def test_a_hook_that_cuts_a_request_has_cancelled_it():
    ended: list[str] = []

    class Hanging:
        async def respond(self, request: ModelRequest) -> Reply:
            if request.model == "fast":
                return Reply(text="fast")
            try:
                await anyio.sleep(60)
            finally:
                ended.append(request.model)
            raise AssertionError

    async def hurry(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        with anyio.move_on_after(0.02):
            return await next()
        return await next(request.replace(model="fast"))

    result = await agent_of(Looks(), client=Hanging(), around_model=hurry).run("go")
    assert (result.content, ended) == ("fast", ["gpt-4o-mini"])


async def test_the_deadline_of_a_run_reaches_a_hook_that_hangs():
    async def hang(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        assert ctx.remaining() < 1
        await anyio.sleep(60)
        return await next()

    result = await agent_of(Looks(), around_model=hang).run("go", timeout=0.05)
    assert result.stop_reason == "deadline"


async def test_the_request_of_a_last_answer_offers_no_tools_whatever_a_hook_says():
    async def offer(ctx: RunContext[Any], request: PendingRequest, next: NextRequest) -> Reply:
        tools.append(len(request.tools))
        return await next(request.replace(tools=schemas))

    tools: list[int] = []
    agent = agent_of(Looks(), client=ScriptedModel(lambda request: "last"), around_model=offer)
    schemas = agent.get_tool_schemas()
    result = await agent.run("go", timeout=30, limits=Limits(reserve=30))
    assert (result.stop_reason, tools) == ("soft_deadline", [0])
    assert "tools" not in agent.client.requests[0].body


async def test_a_hook_is_around_requests_over_the_wire(endpoint: StartEndpoint):
    server = endpoint(lambda request: "done" if request.body.get("temperature") == 0.25 else answers.failure(400, "no"))
    agent = BaseAgent("A", "a", around_model=async_hook([]))
    async with agent:
        assert (await agent.run("go")).content == "done"
        pieces, result = await text_of(agent)
    assert "".join(pieces) == result.content == "done"
    assert len(server.requests) == 2


def test_a_request_says_what_it_is():
    request = PendingRequest(model="large", messages=[{"role": "user", "content": "hi"}])
    assert repr(request) == "<PendingRequest to 'large' with 1 messages and 0 tools>"
    assert request.replace(messages=[]).messages == []
