"""Wrong use is told at once, by an error that says what to do; nothing mistyped is passed over."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from fractal import AgentToolkit, BaseAgent, InvalidArguments, InvalidMessages, Limits, Reply, run_many, sync, tool
from fractal.testing import ScriptedModel
from tests.without_uvloop import anyio_backend  # noqa: F401


def agent(**options: Any) -> BaseAgent:
    return BaseAgent(**{"name": "A", "system_prompt": "a", "client": ScriptedModel(lambda _: "ok"), **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timout": 1}, r"\['timout'\]"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"limits": {"max_requests": 2}}, "give Limits"),
        ({"limits": 0}, "give Limits"),
        ({"max_retries": "3"}, "max_retries='3'"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"messages": 5}, "messages=5"),
        ({"max_iterations": 2.5}, r"max_iterations=2\.5"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"max_iterations": True}, "max_iterations"),
        ({"max_iterations": [{"role": "user", "content": "hi"}]}, "max_iterations"),  # in the place of messages
    ],
    ids=str,
)
async def test_options_of_a_run_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(InvalidArguments, match=words):
        await agent().run("go", **options)
    with pytest.raises(InvalidArguments, match=words):
        await run_many(agent(), ["go"], **options)


@pytest.mark.parametrize("options", [{"timout": 1}, {"limits": 5}], ids=str)
def test_the_facade_refuses_them_in_the_callers_thread(options: dict[str, Any]):
    with pytest.raises(InvalidArguments):
        sync.run(agent(), "go", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": ""}, "give the agent a name"),
        ({"name": 3}, "give the agent a name"),
        ({"system_prompt": None}, "system_prompt=None"),
        ({"limits": {}}, "give Limits"),
        ({"timeout": True}, "timeout=True"),
        ({"observers": [1]}, "cannot be called"),
    ],
    ids=str,
)
def test_options_of_an_agent_that_cannot_be_meant_are_refused_when_it_is_built(options: dict[str, Any], words: str):
    with pytest.raises(InvalidArguments, match=words):
        BaseAgent(**{"name": "A", "system_prompt": "a", **options})
    with pytest.raises(TypeError):
        BaseAgent("A", "a", no_such_option=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["hi"], r"messages\[0\]: a message is a dict"),
        ([{"role": "robot", "content": "hi"}], "unknown role 'robot'"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant"}], r"messages\[1\]"),
        ([{"role": "tool", "tool_call_id": "x", "content": "1"}], "nobody made"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "c", "function": {}}]}],
            "has no result: add a tool message",
        ),
    ],
    ids=str,
)
async def test_a_history_no_endpoint_accepts_is_refused_before_anything_is_sent(messages: list[Any], words: str):
    with pytest.raises(InvalidMessages, match=words):
        await agent().run("go", messages=messages)


def test_what_cannot_be_offered_is_told_where_it_is_given():
    for toolkit in (5, len, "ab", agent()):
        with pytest.raises(InvalidArguments, match="toolkit="):
            agent(toolkit=toolkit)
    with pytest.raises(InvalidArguments, match="terminate='yes'"):
        agent().add_tool(len, terminate="yes")  # type: ignore[arg-type]
    with pytest.raises(InvalidArguments, match="description=3"):
        agent().register_delegate(agent(), description=3)  # type: ignore[arg-type]


def test_no_text_names_a_class_that_nobody_wrote():
    for call in (lambda: agent().update_system_context(1), lambda: agent().add_tool(), lambda: agent().reset(1)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"BaseAgent\.\w+\(\)"):
            call()


def test_an_agent_that_is_not_made_yet_shows_itself_and_refuses_the_rest():
    class Half(BaseAgent):
        def __init__(self) -> None:
            pass

    assert repr(Half()) == str(Half()) == "<Half, not made yet>"
    for use in (lambda: Half().model, lambda: Half().add_tool(len), lambda: sync.run(Half(), "x")):
        with pytest.raises(InvalidArguments, match=r"Half\.__init__ has not called super\(\)"):
            use()


async def test_one_input_given_as_many_is_refused():
    for inputs in ("ab", b"ab", {"a": 1}):
        with pytest.raises(InvalidArguments, match="put it into a list"):
            await run_many(agent(), inputs)


async def test_what_is_no_agent_cannot_be_delegated_to():
    with pytest.raises(InvalidArguments, match="is no agent"):
        agent().register_delegate("someone")  # type: ignore[arg-type]


async def test_a_prompt_function_that_returns_no_text_is_named():
    with pytest.raises(InvalidArguments, match="returned 3, not text"):
        await agent(system_prompt=lambda: 3).run("go")


async def test_a_model_that_returns_no_reply_is_named():
    class Wrong:
        async def respond(self, request: object) -> str:
            return "text"

    with pytest.raises(InvalidArguments, match="not a Reply"):
        await agent(client=Wrong()).run("go")


@pytest.mark.parametrize("count", ["input_tokens", "output_tokens", "cached_input_tokens", "reasoning_tokens"])
async def test_a_model_that_counts_fewer_than_no_tokens_is_named(count: str):
    class Wrong:
        async def respond(self, request: object) -> Reply:
            return Reply(text="text", **{count: -5})  # type: ignore[arg-type]

    with pytest.raises(InvalidArguments, match="fewer than no tokens"):
        await agent(client=Wrong()).run("go")


async def test_an_error_in_a_prompt_function_is_a_result_with_its_cause():
    def prompt() -> str:
        raise LookupError("no template")

    result = await agent(system_prompt=prompt).run("go")
    assert (result.success, result.stop_reason) == (False, "error")
    assert result.metadata["error_type"] == "unexpected_error"
    assert result.exception is not None
    assert isinstance(result.exception.__cause__, LookupError)


async def test_an_observer_that_fails_is_logged_and_disturbs_nobody(caplog: pytest.LogCaptureFixture):
    seen: list[str] = []

    def broken(event: Any) -> None:
        raise RuntimeError("observer")

    result = await agent(observers=[broken, lambda event: seen.append(event.kind)]).run("go")
    assert result.success
    assert seen == ["run_started", "model_requested", "model_responded", "run_finished"]
    assert caplog.text.count("observer") >= 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", 0), ("on_cancel", "kill"), ("max_concurrency", 0), ("on_error", "x"), ("name", "")),
        *(("terminate", "yes"), ("sequential", 1), ("idempotent", None), ("requires_approval", "no")),
    ],
)
def test_options_of_a_tool_that_cannot_be_meant_are_refused(name: str, value: Any):
    with pytest.raises(InvalidArguments, match=f"^{name}="):
        tool(**{name: value})


def test_an_option_that_tools_do_not_have_is_refused_with_those_they_have():
    wrong: dict[str, Any] = {"approval": True}
    with pytest.raises(InvalidArguments, match=r"^tool has no option approval=: it has name, .*, requires_approval, "):
        tool(**wrong)


def test_no_text_is_no_name_for_a_tool():
    def look() -> str:
        return ""

    with pytest.raises(InvalidArguments, match="name=''"):
        agent().add_tool(look, name="")
    with pytest.raises(InvalidArguments, match="name=''"):
        agent().register_delegate(agent(), tool_name="")


@pytest.mark.parametrize("value", [-1, "2", True, float("nan")])
def test_limits_are_numbers_from_zero_up(value: Any):
    with pytest.raises(InvalidArguments, match="max_requests"):
        Limits(max_requests=value)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (lambda lang="en": f"lang={lang}", "lang=en"),
        (lambda ctx: f"left={ctx.remaining():.0f}", "left=60"),
        (functools.partial(lambda ctx, lang: f"{lang} {ctx.depth}", lang="de"), "de 0"),
        (functools.partial(lambda lang: lang, lang="de"), "de"),
        (lambda *arguments: str(len(arguments)), "1"),
    ],
    ids=["default", "context", "partial with context", "partial", "any"],
)
async def test_a_prompt_function_gets_the_context_only_where_it_has_room_for_it(prompt: Any, text: str):
    model = ScriptedModel(["ok"])
    await agent(system_prompt=prompt, client=model).run("go", timeout=60)
    assert model.requests[0]["messages"][0]["content"] == text


async def test_direct_calls_are_told_apart_in_events():
    ids: list[str] = []
    one = agent(observers=[lambda e: ids.append(e.call_id) if e.kind == "tool_finished" else None])
    one.add_tool(lambda: 1, name="one")
    results = [await one.execute_tool("one") for _ in range(3)]
    assert [result.call_id for result in results] == ids
    assert len(set(ids)) == 3


async def test_a_subclass_may_have_private_attributes_of_any_name():
    class Mine(BaseAgent):
        def __init__(self) -> None:
            super().__init__("Mine", "mine", client=ScriptedModel(lambda _: "ok"))
            self._model = self._settings = self._toolkit = self._tools = self._run = self._system_prompt = None
            self._system_context = self._make_prompt = self._run_settings = None

    class Kit(AgentToolkit):
        def __init__(self) -> None:
            self._tools = self._schemas = self._has_methods = None

        @tool
        def one(self) -> int:
            return 1

    assert (await Mine().run("go")).content == "ok"
    assert (await agent(toolkit=Kit()).execute_tool("one")).content == 1
