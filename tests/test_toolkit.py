"""How functions become tools: decorators, discovery, options, names."""

import abc
import copy
import dataclasses
import functools
import inspect
import json
import math
from typing import Any

import pytest
from pydantic import BaseModel

from fractal import (
    AgentToolkit,
    BaseAgent,
    InvalidArguments,
    InvalidTool,
    ModelRequest,
    Reply,
    RunContext,
    Tool,
    ToolNameTaken,
    UserError,
    tool,
)
from fractal.toolkit import ToolOptions, options_of
from tests.support import coroutine, plain, wrapped
from tests.without_uvloop import anyio_backend  # noqa: F401


class Silent:
    """A model that nobody asks."""

    async def respond(self, request: ModelRequest) -> Reply:
        raise AssertionError("no tool of this file asks the model")


def agent(**options: Any) -> BaseAgent:
    return BaseAgent("A", "prompt", client=Silent(), **options)


def names(kit: AgentToolkit) -> list[str]:
    return [one.name for one in kit]


def by_name(kit: AgentToolkit, name: str) -> Tool:
    found = kit.get(name)
    assert found is not None
    return found


# ---- the decorator


def test_the_decorator_leaves_the_function_as_it_is() -> None:
    def f(a: int) -> int:
        """Docs."""
        return a + 1

    for decorate in (tool, tool(), tool(name="other"), AgentToolkit.register_as_tool, AgentToolkit.register_as_tool()):
        assert decorate(f) is f
        assert f(1) == 2


OPTIONS: dict[str, Any] = {
    "name": "other",
    "description": "Said here.",
    "terminate": True,
    "timeout": 2.5,
    "on_cancel": "wait",
    "max_concurrency": 3,
    "sequential": True,
    "on_error": "raise",
    "requires_approval": True,
    "idempotent": True,
    "after_crash": "ask",
}


@pytest.mark.parametrize("decorator", [tool, AgentToolkit.register_as_tool])
@pytest.mark.parametrize("chosen", [*([name] for name in OPTIONS), list(OPTIONS), []], ids="+".join)
def test_every_option_of_the_decorator_reaches_the_tool(decorator: Any, chosen: list[str]) -> None:
    options = {name: OPTIONS[name] for name in chosen}

    @decorator(**options)
    def f() -> None:
        """Docs."""

    [made] = AgentToolkit(f)
    assert made.options == ToolOptions(**options)
    assert made.name == options.get("name", "f")
    assert made.description == options.get("description", "Docs.")
    assert (made.gate is not None) is ("max_concurrency" in options)


def test_the_decorator_and_its_options_class_have_the_same_options() -> None:
    assert set(OPTIONS) == set(inspect.signature(ToolOptions).parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"timeout": "5"},
        {"timeout": True},
        {"max_concurrency": 0},
        {"max_concurrency": -1},
        {"max_concurrency": "2"},
        {"max_concurrency": 1.5},
        {"max_concurrency": True},
        {"on_cancel": "stop"},
        {"on_cancel": None},
        {"on_error": "ignore"},
        {"on_error": None},
        {"name": 5},
        {"description": 5},
        {"name": "two words"},
        {"name": "x" * 65},
    ],
    ids=lambda options: json.dumps(options)[:40],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_written(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(InvalidArguments) as caught:
        tool(**options)
    assert f"{name}={value!r}"[:60] in str(caught.value)


def test_a_description_of_nothing_is_one() -> None:
    @tool(description="")
    def f() -> None:
        """Docs."""

    assert by_name(AgentToolkit(f), "f").description == ""


@pytest.mark.parametrize("timeout", [0.001, 5, math.inf, None])
def test_a_timeout_is_any_time_above_0(timeout: float | None) -> None:
    assert options_of(tool(timeout=timeout)(lambda: None)) == ToolOptions(timeout=timeout)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="nmae"):
        tool(nmae="x")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "target", ["search", 5, property(lambda self: 1), len], ids=["text", "number", "property", "built-in"]
)
def test_what_cannot_be_marked_is_a_clear_type_error(target: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be a tool|give|wrap"):
        tool(target)


# ---- discovery


class Base(AgentToolkit):
    touched: list[str] = []  # noqa: RUF012

    @property
    def fails(self) -> str:
        self.touched.append("property")
        raise RuntimeError("properties are not to be run")

    @functools.cached_property
    def fails_too(self) -> str:
        self.touched.append("cached property")
        raise RuntimeError("properties are not to be run")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.touched.append(name)
        raise RuntimeError("attributes are not to be looked up")

    @tool
    def first(self, x: int) -> str:
        """First."""
        return f"first {x} of {type(self).__name__}"

    @tool(name="renamed")
    async def second(self, x: int) -> str:
        return f"second {x}"

    def no_tool(self) -> None: ...

    @tool
    def replaced(self, x: int) -> str:
        return "base"

    @tool
    def unmarked_below(self) -> str:
        return "base"

    @tool
    def removed_below(self) -> str:
        return "base"

    @tool
    @staticmethod
    def static_outside(x: int) -> str:
        return f"static {x}"

    @staticmethod
    @tool
    def static_inside(x: int) -> str:
        return f"static {x}"

    @tool
    @classmethod
    def class_outside(cls, x: int) -> str:
        return f"{cls.__name__} {x}"

    @classmethod
    @tool
    def class_inside(cls, x: int) -> str:
        return f"{cls.__name__} {x}"


class Derived(Base):
    @tool(description="Replaced below.")
    def replaced(self, x: int, y: int = 1) -> str:
        return "derived"

    def unmarked_below(self) -> str:
        return "derived"

    removed_below = None  # type: ignore[assignment]

    @tool
    def added(self, x: int) -> str:
        return "added"


BASE_TOOLS = [
    "first", "renamed", "replaced", "unmarked_below", "removed_below",
    "static_outside", "static_inside", "class_outside", "class_inside",
]  # fmt: skip
DERIVED_TOOLS = [*(name for name in BASE_TOOLS if not name.endswith("_below")), "added"]


def test_marked_methods_are_tools_in_the_order_of_definition_and_nothing_else_is_touched() -> None:
    Base.touched.clear()
    assert names(Base()) == BASE_TOOLS
    assert names(Derived()) == DERIVED_TOOLS
    assert Base.touched == []


def test_inherited_and_overridden_tools_follow_pythons_rules() -> None:
    replaced = by_name(Derived(), "replaced")
    assert replaced.function(x=1) == "derived"
    assert set(replaced.parameters.json_schema["properties"]) == {"x", "y"}
    assert replaced.description == "Replaced below."
    assert by_name(Derived(), "first").function(x=1) == "first 1 of Derived"
    assert by_name(Derived(), "class_outside").function(x=1) == "Derived 1"


def test_no_tool_takes_self_or_cls() -> None:
    for made in Base():
        assert set(made.parameters.json_schema["properties"]) <= {"x"}, made.name


def test_an_override_without_a_docstring_keeps_the_description() -> None:
    class Below(Base):
        @tool
        def first(self, x: int) -> str:
            return "below"

    assert by_name(Below(), "first").description == "First."


def test_tools_of_several_bases_are_joined_and_the_first_base_wins() -> None:
    class Left(AgentToolkit):
        @tool
        def both(self) -> str:
            return "left"

        @tool
        def left(self) -> None: ...

    class Right(AgentToolkit):
        @tool
        def both(self) -> str:
            return "right"

        @tool
        def right(self) -> None: ...

    class Joined(Left, Right):
        pass

    kit = Joined()
    assert sorted(names(kit)) == ["both", "left", "right"]
    assert by_name(kit, "both").function() == "left"


class Proxy:
    """Like a web framework's `request`: looking at it outside of a request raises."""

    def __getattr__(self, name: str) -> Any:
        pytest.fail(f"{name}: outside of a request")

    def __call__(self) -> None: ...


def test_discovery_looks_into_no_object_that_happens_to_be_a_class_attribute() -> None:
    class Kit(AgentToolkit):
        request = Proxy()

        @tool
        def f(self) -> None: ...

    assert names(Kit()) == ["f"]


def test_discovery_works_on_agents_too() -> None:
    class Agent(BaseAgent):
        def __init__(self) -> None:
            super().__init__("A", "prompt", client=Silent(), toolkit=AgentToolkit(plain))
            self.pool = "made later"

        @property
        def fails(self) -> str:
            raise RuntimeError("properties are not to be run")

        @tool
        def own(self) -> str:
            return self.pool

    made = Agent()
    assert list(made.get_tools()) == ["plain", "own"]
    assert made.get_tools()["own"]() == "made later"


# ---- everything that can be called


class Called:
    """Plain."""

    def __call__(self, x: int) -> str:
        return f"got {x}"


class CalledAsync:
    async def __call__(self, x: int) -> str:
        """Plain."""
        return f"got {x}"


class Holder:
    __slots__ = ()

    def method(self, x: int) -> str:
        """Plain."""
        return f"got {x}"

    async def async_method(self, x: int) -> str:
        """Plain."""
        return f"got {x}"

    @staticmethod
    def static(x: int) -> str:
        """Plain."""
        return f"got {x}"

    @classmethod
    async def of_class(cls, x: int) -> str:
        """Plain."""
        return f"got {x}"

    def with_more(self, more: int, x: int) -> str:
        """Plain."""
        return f"got {x}"


def with_more(more: int, x: int) -> str:
    """Plain."""
    return f"got {x}"


async def async_with_more(more: int, x: int) -> str:
    """Plain."""
    return f"got {x}"


CALLABLES: list[tuple[Any, str, bool]] = [  # what, name, whether it is awaited
    (plain, "plain", False),
    (coroutine, "coroutine", True),
    (wrapped(plain), "plain", False),
    (wrapped(coroutine), "coroutine", False),
    (functools.partial(with_more, 1), "with_more", False),
    (functools.partial(async_with_more, 1), "async_with_more", True),
    (functools.partial(functools.partial(with_more), 1), "with_more", False),
    (functools.partial(Holder().with_more, 1), "with_more", False),
    (functools.partial(Called()), "Called", False),
    (Called(), "Called", False),
    (CalledAsync(), "CalledAsync", True),
    (Holder().method, "method", False),
    (Holder().async_method, "async_method", True),
    (Holder.static, "static", False),
    (Holder().static, "static", False),
    (Holder.of_class, "of_class", True),
]


@pytest.mark.parametrize(
    ("function", "name", "is_async"), CALLABLES, ids=[str(i) + c[1] for i, c in enumerate(CALLABLES)]
)
async def test_whatever_can_be_called_can_be_a_tool(function: Any, name: str, is_async: bool) -> None:
    made = Tool.from_function(function)

    assert (made.name, made.description, made.is_async) == (name, "Plain.", is_async)
    assert made.parameters.json_schema["properties"] == {"x": {"type": "integer"}}
    assert made.parameters.json_schema["required"] == ["x"]
    result = await agent().add_tool(function).execute_tool(name, x=5)
    assert (result.content, result.error, result.outcome) == ("got 5", None, "ok")


async def test_every_kind_of_marked_method_can_be_executed() -> None:
    one = agent(toolkit=Derived())
    for name in DERIVED_TOOLS:
        result = await one.execute_tool(name, x=3)
        assert result.error is None, name
    assert (await one.execute_tool("class_inside", x=3)).content == "Derived 3"
    assert (await one.execute_tool("static_outside", x=3)).content == "static 3"
    assert (await one.execute_tool("renamed", x=3)).content == "second 3"


def test_what_a_partial_has_bound_by_name_is_not_for_the_model_to_change() -> None:
    def read(path: str, root: str = ".") -> str:
        return f"{root}/{path}"

    parameters = Tool.from_function(functools.partial(read, root="/safe")).parameters
    assert list(parameters.json_schema["properties"]) == ["path"]


def test_a_partial_may_bind_what_has_no_form_in_json() -> None:
    def read(path: str, pool: Silent) -> str:
        return path

    assert Tool.from_function(functools.partial(read, pool=Silent())).name == "read"


def test_a_lambda_can_be_given_a_name() -> None:
    nameless: Any = lambda q: q  # noqa: E731
    assert names_of_added(nameless, name="echo") == ["echo"]


def names_of_added(function: Any, **options: Any) -> list[str]:
    kit = AgentToolkit()
    kit.add_tool(function, **options)
    return names(kit)


def test_no_callable_object_is_looked_into() -> None:
    class Touchy:
        @property
        def func(self) -> Any:
            raise RuntimeError("properties are not to be run")

        def __call__(self, x: int) -> int:
            return x

    assert Tool.from_function(Touchy()).parameters.json_schema["required"] == ["x"]


# ---- names


def größe(city: str) -> str:
    return city


def long_named() -> None: ...


long_named.__name__ = "a" * 65


class Names(AgentToolkit):
    @tool
    def größe(self) -> None: ...


class Größe:
    def __call__(self, x: int) -> int:
        return x


REFUSED: list[Any] = [größe, long_named, functools.partial(größe, "Rome"), Größe(), functools.partial(Größe()), Größe]


@pytest.mark.parametrize("function", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_a_name_that_no_endpoint_takes_is_refused_when_the_tool_is_added(function: Any) -> None:
    for add in (AgentToolkit, agent().add_tool, Tool.from_function):
        with pytest.raises(InvalidTool, match="give it name=…"):
            add(function)
    assert names_of_added(function, name="fine") == ["fine"]
    assert Tool.from_function(function, ToolOptions(name="fine")).name == "fine"


def test_a_method_or_a_ready_tool_of_such_a_name_is_refused_too() -> None:
    for make in (Names, lambda: dataclasses.replace(Tool.from_function(plain), name="two words")):
        with pytest.raises(InvalidTool, match="give it name=…"):
            make()
    with pytest.raises(InvalidArguments, match="endpoints take"):
        agent().register_delegate(agent(), tool_name="two words")
    with pytest.raises(UserError):
        agent().register_delegate(agent(), tool_name="\ud800")


# ---- what a toolkit's class may be


@dataclasses.dataclass(frozen=True)
class Frozen(AgentToolkit):
    table: str

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots(AgentToolkit):
    table: str

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


@dataclasses.dataclass
class WithoutInit(AgentToolkit):
    table: str

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


class Guarding(AgentToolkit):
    __slots__ = ("table",)

    def __init__(self, table: str) -> None:
        object.__setattr__(self, "table", table)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("nothing is assigned")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("nothing is compared")

    __hash__ = None  # type: ignore[assignment]

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


class Checked(BaseModel, AgentToolkit):  # whose objects iterate over their fields
    table: str

    def __init__(self, table: str) -> None:
        super().__init__(table=table)

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


class Abstract(AgentToolkit, abc.ABC):
    @tool
    @abc.abstractmethod
    def read(self, row: int) -> str: ...


class Concrete(Abstract):
    def __init__(self, table: str) -> None:
        self.table = table

    @tool
    def read(self, row: int) -> str:
        return f"{self.table} {row}"


@pytest.mark.parametrize(
    "kind", [Frozen, FrozenSlots, WithoutInit, Guarding, Checked, Concrete], ids=lambda kind: kind.__name__
)
async def test_a_toolkit_may_be_whatever_python_lets_a_class_be(kind: Any) -> None:
    kit = kind("cities")
    kit.add_tool(plain)
    one = agent(toolkit=kit)
    assert list(kit.tools) == list(one.get_tools()) == ["read", "plain"]
    assert (await one.execute_tool("read", row=1)).content == "cities 1"
    assert len(kit.get_tool_schemas()) == 2
    assert len(kit.tools) == len(kind("more").tools) + 1, "nothing is shared by the instances of a class"


@pytest.mark.parametrize("kind", [Frozen, WithoutInit, Concrete], ids=lambda kind: kind.__name__)
def test_a_copy_of_a_toolkit_goes_on_on_its_own(kind: Any) -> None:
    kit = kind("cities")
    kit.add_tool(plain)
    other = copy.copy(kit)
    other.add_tool(coroutine)
    assert (names(kit), names(other)) == (["read", "plain"], ["read", "plain", "coroutine"])


# ---- the toolkit


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolNameTaken) as caught:
        AgentToolkit(plain, wrapped(plain))
    assert caught.value.tool_name == "plain"

    class Twice(AgentToolkit):
        @tool(name="one")
        def first(self) -> None: ...

        @tool(name="one")
        def second(self) -> None: ...

    with pytest.raises(ToolNameTaken):
        Twice()
    with pytest.raises(ToolNameTaken):
        agent(toolkit=AgentToolkit(plain)).add_tool(wrapped(plain))


def test_a_refused_tool_leaves_the_toolkit_as_it_was() -> None:
    def bad(*args: int) -> None: ...

    kit = AgentToolkit(plain)
    for wrong in (wrapped(plain), bad, 5):
        with pytest.raises((ToolNameTaken, InvalidTool)):
            kit.add_tool(wrong)  # type: ignore[arg-type]
    assert names(kit) == ["plain"]
    assert len(kit.get_tool_schemas()) == 1


def test_what_is_said_when_a_tool_is_added_goes_before_what_the_decorator_said() -> None:
    @tool(name="marked", description="Marked.", timeout=3)
    def f() -> None:
        """Docs."""

    kit = AgentToolkit()
    made = kit.add_tool(f, name="added", description="Added.", terminate=True)
    again = kit.add_tool(f)

    assert (made.name, made.description, made.options.terminate, made.options.timeout) == ("added", "Added.", True, 3)
    assert (again.name, again.description, again.options.terminate) == ("marked", "Marked.", False)
    assert options_of(f) == ToolOptions(name="marked", description="Marked.", timeout=3)


def test_a_ready_tool_can_be_added_under_another_name() -> None:
    ready = Tool.from_function(plain)
    kit = AgentToolkit()
    kit.add_tool(ready, name="other", description="Said here.", terminate=True)

    made = by_name(kit, "other")
    assert (made.description, made.options.terminate) == ("Said here.", True)
    assert ready.name == "plain"


def test_terminate_said_by_the_decorator_holds_when_the_tool_is_added() -> None:
    kit = AgentToolkit()
    assert kit.add_tool(tool(terminate=True)(lambda: None), name="end").options.terminate


def test_a_toolkit_is_a_collection_of_tools() -> None:
    kit = AgentToolkit(plain, coroutine)

    assert len(kit) == 2
    assert "plain" in kit
    assert "other" not in kit
    assert kit.get("other") is None
    assert kit.get_tools() == {"plain": plain, "coroutine": coroutine}
    assert list(kit.tools) == ["plain", "coroutine"]
    with pytest.raises(TypeError):
        kit.tools["x"] = by_name(kit, "plain")  # type: ignore[index]


def test_a_tool_is_shown_as_a_chat_completions_function() -> None:
    [schema] = AgentToolkit(plain).get_tool_schemas()
    assert schema == {
        "type": "function",
        "function": {
            "name": "plain",
            "description": "Plain.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }


def test_every_schema_is_json_for_strict_readers() -> None:
    def f(a: float = math.inf, b: Any = Silent(), c: float = math.nan) -> None: ...  # noqa: B008

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    json.loads(AgentToolkit(f).schemas().encoded(), parse_constant=refuse)


def test_the_schemas_are_built_once_until_a_tool_is_added() -> None:
    kit = AgentToolkit(plain)
    schemas = kit.schemas()
    assert kit.schemas() is schemas
    assert schemas.encoded() is schemas.encoded()
    before = kit.tools
    kit.add_tool(coroutine)

    assert len(kit.schemas().schemas) == 2
    assert len(schemas.schemas) == 1
    assert list(before) == ["plain"], "runs that have begun keep the tools they began with"


@pytest.mark.parametrize(
    "name", ["first", "renamed", "class_inside", "class_outside", "static_inside", "static_outside"]
)
def test_a_schema_is_built_once_for_each_function_of_a_class(name: str) -> None:
    assert by_name(Base(), name).parameters is by_name(Base(), name).parameters


def test_a_schema_is_built_once_for_a_function_of_a_module() -> None:
    assert by_name(AgentToolkit(plain), "plain").parameters is by_name(AgentToolkit(plain), "plain").parameters


def test_a_function_and_the_method_made_of_it_are_not_confused() -> None:
    class Kit:
        def f(self, x: int) -> None: ...

    for _ in range(2):
        assert list(Tool.from_function(Kit().f).parameters.json_schema["properties"]) == ["x"]
        assert list(Tool.from_function(Kit.f).parameters.json_schema["properties"]) == ["self", "x"]


def test_the_limit_of_a_tool_is_one_for_all_agents_and_instances() -> None:
    class Kit(AgentToolkit):
        @tool(max_concurrency=2)
        def f(self) -> None: ...

    gate = by_name(Kit(), "f").gate
    assert gate is not None
    assert by_name(Kit(), "f").gate is gate


def test_a_toolkit_is_shared_by_agents_that_go_on_on_their_own() -> None:
    kit = Base()
    one, two = agent(toolkit=kit), agent(toolkit=kit)
    one.add_tool(plain)
    kit.add_tool(coroutine)

    assert list(one.get_tools()) == [*BASE_TOOLS, "plain"]
    assert list(two.get_tools()) == BASE_TOOLS
    assert one.get_tools()["first"].__self__ is two.get_tools()["first"].__self__ is kit  # type: ignore[attr-defined]


async def test_a_tool_added_after_the_agent_is_built_works_at_once() -> None:
    one = agent()
    assert one.get_tool_schemas() == []
    assert one.add_tool(plain, name="late", terminate=True) is one
    assert [schema["function"]["name"] for schema in one.get_tool_schemas()] == ["late"]
    result = await one.execute_tool("late", x=1)
    assert (result.content, result.metadata) == ("got 1", {"arguments": {"x": 1}, "terminate": True})


async def test_an_unknown_tool_and_arguments_that_do_not_fit_are_results() -> None:
    one = agent(toolkit=AgentToolkit(plain))

    unknown = await one.execute_tool("search", x=1)
    assert (unknown.outcome, unknown.content) == ("error", None)
    assert "there is no tool 'search'. Tools: plain" in (unknown.error or "")
    misfit = await one.execute_tool("plain", x="many", y=1)
    assert misfit.outcome == "error"
    assert "'x'" in (misfit.error or "")
    assert "no parameter 'y'" in (misfit.error or "")
    assert misfit.metadata["arguments"] == {"x": "many", "y": 1}


async def test_arguments_of_a_tool_may_be_called_like_those_of_the_methods_that_pass_them_on() -> None:
    def f(self: int, tool_name: int, name: int, messages: int, ctx: int, arguments: int, agent: int) -> int:
        return self + tool_name + name + messages + ctx + arguments + agent

    result = (
        await agent()
        .add_tool(f)
        .execute_tool("f", self=1, tool_name=1, name=1, messages=1, ctx=1, arguments=1, agent=1)
    )
    assert (result.content, result.error) == (7, None)


async def test_a_marked_method_gets_the_context_and_its_own_arguments() -> None:
    class Kit(AgentToolkit):
        @tool
        async def f(self, x: int, run: RunContext) -> Any:
            return x, run.tool_name, run.agent

    one = agent(toolkit=Kit())
    assert (await one.execute_tool("f", x=1)).content == (1, "f", one)


def test_a_toolkit_in_the_place_of_a_function_is_told_where_it_goes() -> None:
    class Kit(AgentToolkit):
        pass

    words = r"'Kit' cannot be a tool: it is a toolkit: give an agent toolkit=…, or add the methods"
    for add in (lambda: BaseAgent("A", "a").add_tool(Kit()), lambda: BaseAgent("A", "a", toolkit=[Kit()])):  # type: ignore[arg-type]
        with pytest.raises(InvalidTool, match=words):
            add()
