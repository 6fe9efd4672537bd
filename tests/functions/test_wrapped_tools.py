"""What `tool` said of a function holds for every callable that ends in it, however that is offered and called."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from fractal import AgentToolkit, BaseAgent, InvalidTool, Limits, Tool, run_many, sync, tool
from fractal.testing import ScriptedModel, answers
from fractal.toolkit import ToolOptions
from tests.support import in_thread, outcomes

Marked = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Marks a function, as `tool(…)` does."""

# A partial that a class holds becomes a method with Python 3.14; from 3.13 on that is said.
pytestmark = pytest.mark.filterwarnings("ignore:functools.partial will be a method descriptor:FutureWarning")

ran: list[str] = []
kept: list[Any] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> Iterator[None]:
    ran.clear()
    yield
    ran.clear()
    kept.clear()


# ---- ways to offer what ends in a marked function: each makes what `add_tool` or `toolkit=` takes

WAYS: dict[str, Callable[[Marked], Any]] = {}


def way(function: Callable[[Marked], Any]) -> Callable[[Marked], Any]:
    WAYS[function.__name__] = function
    return function


def plain_function() -> Any:
    def remove(path: str, root: str = "/") -> str:
        """Remove a file."""
        ran.append(path)
        return f"removed {path}"

    return remove


def async_function() -> Any:
    async def remove(path: str, root: str = "/") -> str:
        """Remove a file."""
        await anyio.sleep(0)
        ran.append(path)
        return f"removed {path}"

    return remove


@way
def function(marked: Marked) -> Any:
    return marked(plain_function())


@way
def async_one(marked: Marked) -> Any:
    return marked(async_function())


@way
def partial(marked: Marked) -> Any:
    return functools.partial(marked(plain_function()), root="/srv")


@way
def partial_of_async(marked: Marked) -> Any:
    return functools.partial(marked(async_function()), root="/srv")


@way
def partial_of_partial(marked: Marked) -> Any:
    inner = functools.update_wrapper(functools.partial(marked(plain_function()), root="/a"), plain_function())
    return functools.partial(inner, root="/b")


@way
def marked_partial(marked: Marked) -> Any:
    return functools.partial(marked(functools.partial(plain_function(), root="/a")), root="/b")


@way
def partial_that_looks_like_its_function(marked: Marked) -> Any:
    inner = marked(plain_function())
    return functools.update_wrapper(functools.partial(inner, root="/srv"), inner)


@way
def wrapper(marked: Marked) -> Any:
    inner = marked(plain_function())

    @functools.wraps(inner)
    def logged(*arguments: Any, **named: Any) -> Any:
        return inner(*arguments, **named)

    return logged


@way
def wrapper_that_copies_no_attributes(marked: Marked) -> Any:
    inner = marked(plain_function())

    @functools.wraps(inner, updated=())
    def logged(*arguments: Any, **named: Any) -> Any:
        return inner(*arguments, **named)

    return logged


@way
def wrapper_of_a_partial(marked: Marked) -> Any:
    inner = functools.partial(marked(plain_function()), root="/srv")

    @functools.wraps(inner)
    def remove(*arguments: Any, **named: Any) -> Any:
        return inner(*arguments, **named)

    return remove


@way
def cached(marked: Marked) -> Any:
    return functools.lru_cache(marked(plain_function()))


@way
def partial_of_cached(marked: Marked) -> Any:
    return functools.partial(functools.cache(marked(plain_function())), root="/srv")


@way
def said_again_with_another_option(marked: Marked) -> Any:
    return tool(description="Said again.")(marked(plain_function()))


@way
def said_again_without_options(marked: Marked) -> Any:
    return tool(marked(plain_function()))


@way
def said_again_of_a_partial(marked: Marked) -> Any:
    return tool(description="Said again.")(functools.partial(marked(plain_function()), root="/srv"))


class Holder:
    """Has every kind of method; made anew for each test, since `marked` is said of its functions."""

    def __init__(self, marked: Marked) -> None:
        class Held:
            @marked
            def method(self, path: str, root: str = "/") -> str:
                ran.append(path)
                return f"removed {path}"

            @classmethod
            @marked
            def of_class(cls, path: str, root: str = "/") -> str:
                ran.append(path)
                return f"removed {path}"

            @staticmethod
            @marked
            def static(path: str, root: str = "/") -> str:
                ran.append(path)
                return f"removed {path}"

            @functools.lru_cache  # noqa: B019
            @marked
            def cached(self, path: str, root: str = "/") -> str:
                ran.append(path)
                return f"removed {path}"

            part = functools.partialmethod(method, root="/srv")
            part_of_class = functools.partialmethod(of_class, root="/srv")
            part_of_part = functools.partialmethod(part, root="/var")

        self.held = Held()


for name in ("method", "of_class", "static", "cached", "part", "part_of_class", "part_of_part"):

    def _method(marked: Marked, name: str = name) -> Any:
        return getattr(Holder(marked).held, name)

    def _partial_of_method(marked: Marked, name: str = name) -> Any:
        return functools.partial(getattr(Holder(marked).held, name), root="/opt")

    WAYS[f"bound {name}"], WAYS[f"partial of bound {name}"] = _method, _partial_of_method


def removing_class(marked: Marked, **members: Any) -> type:
    class Remover:
        """Removes files."""

        @marked
        def __call__(self, path: str, root: str = "/") -> str:
            ran.append(path)
            return f"removed {path}"

    return type("Remover", (Remover,), members)


@way
def callable_object(marked: Marked) -> Any:
    return removing_class(marked)()


@way
def partial_of_an_object(marked: Marked) -> Any:
    return functools.partial(removing_class(marked)(), root="/srv")


@way
def object_that_is_marked_itself(marked: Marked) -> Any:
    return marked(removing_class(lambda function: function)())


@way
def object_of_a_marked_class(marked: Marked) -> Any:
    return marked(removing_class(lambda function: function))()  # type: ignore[operator]


@way
def object_that_is_called_by_a_static_method(marked: Marked) -> Any:
    return type("Remover", (), {"__call__": staticmethod(marked(plain_function()))})()


@way
def object_that_is_called_by_a_partial(marked: Marked) -> Any:
    return type("Remover", (), {"__call__": staticmethod(functools.partial(marked(plain_function()), root="/a"))})()


@way
def object_that_wraps(marked: Marked) -> Any:
    inner = marked(plain_function())

    class Logged:
        def __init__(self, function: Any) -> None:
            functools.update_wrapper(self, function, updated=())
            self.function = function

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return self.function(*arguments, **named)

    return Logged(inner)


@way
def weak_proxy(marked: Marked) -> Any:
    kept.append(marked(plain_function()))
    return weakref.proxy(kept[-1])


class Slotted:
    """As the proxies of decorator libraries are: all is in slots, and attributes are those of what it wraps."""

    __slots__ = ("__wrapped__",)

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__wrapped__(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


@way
def slotted_proxy(marked: Marked) -> Any:
    return Slotted(marked(plain_function()))


class Lazy:
    """As the proxies of task queues and web frameworks are: whatever they are asked is asked of what they find."""

    def __init__(self, find: Callable[[], Any]) -> None:
        object.__setattr__(self, "_find", find)

    def __call__(self, path: str, root: str = "/") -> Any:
        return self._find()(path, root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._find(), name, value)


class Described:
    """As the proxies are that have what they wrap in a property."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @property
    def __wrapped__(self) -> Any:
        return self._function

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)


class Curried:
    """As libraries make partials of their own."""

    def __init__(self, function: Any, **keywords: Any) -> None:
        self._partial = functools.partial(function, **keywords)
        self.__name__ = function.__name__

    func = property(lambda self: self._partial.func)
    args = property(lambda self: self._partial.args)
    keywords = property(lambda self: self._partial.keywords)

    def __call__(self, path: str) -> Any:
        return self._partial(path)


@way
def partial_of_a_library(marked: Marked) -> Any:
    return Curried(marked(plain_function()), root="/srv")


def lazily(made: Any) -> Lazy:
    return Lazy(lambda: made)


@way
def lazy_proxy(marked: Marked) -> Any:
    return lazily(marked(plain_function()))


@way
def lazy_proxy_of_a_wrapper(marked: Marked) -> Any:
    return lazily(wrapper_that_copies_no_attributes(marked))


@way
def partial_of_a_lazy_proxy(marked: Marked) -> Any:
    return functools.partial(lazily(wrapper_that_copies_no_attributes(marked)), root="/srv")


@way
def lazy_proxy_that_is_marked_itself(marked: Marked) -> Any:
    return marked(lazily(plain_function()))


@way
def proxy_with_a_property(marked: Marked) -> Any:
    return Described(marked(plain_function()))


@way
def one_implementation_of_several(marked: Marked) -> Any:
    @functools.singledispatch
    def remove(path: Any, /, root: str = "/") -> str:
        """Remove a file."""
        raise AssertionError("paths are texts")

    def remove_text(path: str, /, root: str = "/") -> str:
        ran.append(path)
        return f"removed {path}"

    remove.register(str)(marked(remove_text))
    return remove


@way
def class_that_is_called(marked: Marked) -> Any:
    class Remove:
        """Remove a file."""

        @marked
        def __new__(cls, path: str, root: str = "/") -> Any:
            ran.append(path)
            return f"removed {path}"

    return Remove


@way
def ready_tool(marked: Marked) -> Any:
    return Tool.from_function(marked(plain_function()))


@way
def ready_tool_with_options(marked: Marked) -> Any:
    return Tool.from_function(marked(plain_function()), ToolOptions(description="Said again."))


@way
def ready_tool_of_a_partial(marked: Marked) -> Any:
    return Tool.from_function(functools.partial(marked(plain_function()), root="/srv"))


@way
def tool_made_by_hand(marked: Marked) -> Any:
    inner = marked(plain_function())
    made = Tool.from_function(plain_function())
    return Tool(Tool.from_function(inner).name, "By hand.", inner, made.parameters, False, ToolOptions())


@way
def tool_whose_options_were_replaced(marked: Marked) -> Any:
    made = Tool.from_function(marked(plain_function()))
    return dataclasses.replace(made, options=ToolOptions(description="Replaced."), gate=None)


@way
def toolkit_of_functions(marked: Marked) -> Any:
    return AgentToolkit(functools.partial(marked(plain_function()), root="/srv"))


@way
def toolkit_with_a_method(marked: Marked) -> Any:
    class Kit(AgentToolkit):
        @marked
        def remove(self, path: str, root: str = "/") -> str:
            ran.append(path)
            return f"removed {path}"

    return Kit()


@way
def toolkit_that_inherits(marked: Marked) -> Any:
    return type("Below", (type(toolkit_with_a_method(marked)),), {})()


@way
def toolkit_with_a_partial(marked: Marked) -> Any:
    return type("Kit", (AgentToolkit,), {"remove": functools.partial(marked(plain_function()), root="/srv")})()


@way
def toolkit_with_a_static_partial(marked: Marked) -> Any:
    part = staticmethod(functools.partial(marked(plain_function()), root="/srv"))
    return type("Kit", (AgentToolkit,), {"remove": part})()


@way
def toolkit_with_a_partial_method(marked: Marked) -> Any:
    def remove(self: Any, path: str, root: str = "/") -> str:
        ran.append(path)
        return f"removed {path}"

    part = functools.partialmethod(marked(remove), root="/srv")
    return type("Kit", (AgentToolkit,), {"remove": part})()


@way
def toolkit_with_an_object(marked: Marked) -> Any:
    return type("Kit", (AgentToolkit,), {"remove": removing_class(marked)()})()


@way
def toolkit_with_a_cached_method(marked: Marked) -> Any:
    @functools.lru_cache
    @marked
    def remove(self: Any, path: str, root: str = "/") -> str:
        ran.append(path)
        return f"removed {path}"

    return type("Kit", (AgentToolkit,), {"remove": remove, "__hash__": object.__hash__})()


class Binding:
    """A descriptor that makes something callable of what it wraps, which it is not itself."""

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        def bound(path: str, root: str = "/") -> Any:
            return self.__wrapped__(instance, path, root)

        return bound


@way
def toolkit_with_a_descriptor(marked: Marked) -> Any:
    class Kit(AgentToolkit):
        @Binding
        @marked
        def remove(self, path: str, root: str = "/") -> str:
            """Remove a file."""
            ran.append(path)
            return f"removed {path}"

    return Kit()


@way
def toolkit_whose_instance_has_a_wrapper(marked: Marked) -> Any:
    class Kit(AgentToolkit):
        def __init__(self) -> None:
            inner = self.remove

            def logged(path: str, root: str = "/") -> str:
                return str(inner(path, root))

            self.remove = logged  # type: ignore[method-assign]
            super().__init__()

        @marked
        def remove(self, path: str, root: str = "/") -> str:
            ran.append(path)
            return f"removed {path}"

    return Kit()


def offered(made: Any, **options: Any) -> BaseAgent:
    if isinstance(made, AgentToolkit):
        return BaseAgent("Keeper", "You keep files.", toolkit=made, **options)
    return BaseAgent("Keeper", "You keep files.", **options).add_tool(made)


def only_name(agent: BaseAgent) -> str:
    [schema] = agent.get_tool_schemas()
    return str(schema["function"]["name"])


def keeper(made: Any, calls: int = 1, **options: Any) -> BaseAgent:
    """An agent with one tool, whose model calls it."""
    name = only_name(offered(made))
    script = [[answers.call(name, {"path": str(n)}) for n in range(calls)], "done"]
    return offered(made, client=ScriptedModel(script), **options)


# ---- approval, in each way to be called


async def by_run(agent: BaseAgent) -> str:
    return outcomes(await agent.run("go"))[0]


async def by_stream(agent: BaseAgent) -> str:
    async with agent.stream("go") as stream:
        return outcomes(await stream.result())[0]


async def by_run_many(agent: BaseAgent) -> str:
    [result] = await run_many(agent, ["go"])
    return outcomes(result)[0]


async def by_sync_run(agent: BaseAgent) -> str:
    return outcomes(await in_thread(sync.run, agent, "go"))[0]


async def by_execute_tool(agent: BaseAgent) -> str:
    return (await agent.execute_tool(only_name(agent), path="0")).outcome


async def by_sync_execute_tool(agent: BaseAgent) -> str:
    return str((await in_thread(lambda: sync.execute_tool(agent, only_name(agent), path="0"))).outcome)


async def as_delegate(agent: BaseAgent) -> str:
    seen: list[str] = []

    def watch(event: Any) -> None:
        if event.kind == "tool_finished" and event.agent_name == "Keeper":
            seen.append(event.result.outcome)

    boss = BaseAgent(
        "Boss",
        "You ask.",
        client=ScriptedModel([answers.call("delegate_to_keeper", {"query": "go"}), "done"]),
        observers=[watch],
    ).register_delegate(agent, tool_name="delegate_to_keeper")
    await boss.run("go")
    return seen[0]


ENTRIES = [by_run, by_stream, by_run_many, by_sync_run, by_execute_tool, by_sync_execute_tool, as_delegate]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("name", WAYS)
async def test_a_guarded_function_is_never_called_unasked(name: str, entry: Any) -> None:
    asked: list[str] = []
    agent = keeper(WAYS[name](tool(requires_approval=True)), approve=lambda call: bool(asked.append(call.tool_name)))
    assert await entry(agent) == "denied"
    assert (len(asked), ran) == (1, [])


@pytest.mark.parametrize("name", WAYS)
async def test_a_guarded_function_is_called_when_it_is_allowed(name: str) -> None:
    agent = keeper(WAYS[name](tool(requires_approval=True)), approve=lambda call: True)
    result = await agent.run("go")
    assert (outcomes(result), ran) == (["ok"], ["0"])
    assert result.tool_results[0].content == "removed 0"


# ---- the other options


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "said",
    [
        {"timeout": 2.5},
        {"on_error": "raise"},
        {"on_cancel": "wait"},
        {"sequential": True},
        {"idempotent": True},
        {"terminate": True},
        {"max_concurrency": 3},
        {"name": "renamed"},
        {"requires_approval": True},
    ],
    ids=lambda said: next(iter(said)),
)
def test_every_option_is_found(name: str, said: dict[str, Any]) -> None:
    made = WAYS[name](tool(**said))
    kit = made if isinstance(made, AgentToolkit) else AgentToolkit(made)
    [found] = kit
    [(option, value)] = said.items()
    assert getattr(found.options, option) == value
    assert option != "name" or found.name == value
    assert (found.gate is not None) is (option == "max_concurrency")


SAID_AGAIN = {name for name in WAYS if "again" in name or "by_hand" in name or "replaced" in name or "options" in name}


@pytest.mark.parametrize("name", [name for name in WAYS if name not in SAID_AGAIN - {"said_again_without_options"}])
def test_a_description_is_found(name: str) -> None:
    made = WAYS[name](tool(description="Said once."))
    [found] = made if isinstance(made, AgentToolkit) else AgentToolkit(made)
    assert found.description == "Said once."


async def test_a_partial_is_cut_in_time() -> None:
    @tool(timeout=0.05)
    async def slow(seconds: float, unit: float = 1.0) -> None:
        await anyio.sleep(seconds * unit)

    started = time.monotonic()
    result = await BaseAgent("A", "a").add_tool(functools.partial(slow, unit=1.0)).execute_tool("slow", seconds=30)
    assert result.outcome == "timeout"
    assert time.monotonic() - started < 10


async def test_a_partial_that_raises_ends_the_run_if_its_function_is_said_to() -> None:
    @tool(on_error="raise")
    def fail(path: str, root: str = "/") -> None:
        raise OSError("gone")

    model = ScriptedModel([answers.call("fail", {"path": "x"}), "done"])
    result = await BaseAgent("A", "a", client=model).add_tool(functools.partial(fail, root="/srv")).run("go")
    assert (result.success, result.stop_reason) == (False, "tool_error")


# ---- one function, one limit


async def test_partials_of_one_function_share_its_limit() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    @tool(max_concurrency=1)
    async def look(place: str, room: int = 0) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        await anyio.sleep(0.02)
        with lock:
            running -= 1
        return place

    agent = BaseAgent("A", "a").add_tool(look)
    for room in (1, 2):
        agent.add_tool(functools.partial(look, room=room), name=f"look_{room}")
    async with anyio.create_task_group() as group:
        for name in ("look", "look_1", "look_2", "look"):
            group.start_soon(lambda name=name: agent.execute_tool(name, place="x"))
    assert most == 1


def test_objects_of_a_class_share_the_limit_of_its_call_and_a_new_limit_is_a_new_one() -> None:
    class Look:
        @tool(max_concurrency=2)
        def __call__(self, place: str) -> str:
            return place

    first = Tool.from_function(Look()).gate
    assert first is not None
    assert Tool.from_function(Look()).gate is first
    assert Tool.from_function(functools.partial(Look())).gate is first
    tool(max_concurrency=1)(Look.__call__)
    again = Tool.from_function(Look()).gate
    assert again is not None
    assert again is not first


@pytest.mark.parametrize("made_of", [lazily, Curried])
def test_what_stands_for_two_functions_does_not_make_them_share_a_limit(made_of: Any) -> None:
    one, other = (tool(max_concurrency=1)(plain_function()) for _ in range(2))
    first, second = made_of(one), made_of(other)
    gates = [Tool.from_function(each).gate for each in (first, functools.partial(first), second)]
    assert gates[0] is gates[1] is not gates[2]


def test_what_cannot_be_remembered_has_a_limit_of_its_own() -> None:
    class Inner:
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return False

        def __call__(self, place: str) -> str:
            return place

    made = [Tool.from_function(functools.partial(Inner()), ToolOptions(max_concurrency=1)) for _ in range(2)]
    assert made[0].gate is made[1].gate, "it is the function's, which can be"
    builtin = [Tool.from_function([].index, ToolOptions(max_concurrency=1)) for _ in range(2)]
    assert builtin[0].gate is not None
    assert builtin[0].gate is not builtin[1].gate


async def test_an_abandoned_call_is_waited_for_by_a_partial_of_its_function() -> None:
    """Two calls at once may do harm, whatever the second one is called by."""
    release, asked_again, seen = threading.Event(), anyio.Event(), []

    def write(line: str, file: str = "a") -> str:
        seen.append(f"{line} begins")
        release.wait(30)
        seen.append(f"{line} ends")
        return line

    script = [answers.call("write", {"line": "first"}), answers.call("again", {"line": "second"}), "done"]

    def watch(event: Any) -> None:
        if event.kind == "tool_started" and event.tool_name == "again":
            asked_again.set()

    agent = BaseAgent("A", "a", client=ScriptedModel(script), observers=[watch])
    agent.add_tool(functools.partial(tool(timeout=0.5)(write), file="x"), name="write")
    agent.add_tool(tool(timeout=30.0)(functools.partial(write, file="y")), name="again")
    try:
        async with anyio.create_task_group() as group:

            async def let_go() -> None:
                await asked_again.wait()
                await anyio.sleep(0.1)  # the second would have begun by now
                assert seen == ["first begins"]
                release.set()

            group.start_soon(let_go)
            result = await agent.run("go")
    finally:
        release.set()
    assert outcomes(result) == ["abandoned", "ok"]
    assert seen == ["first begins", "first ends", "second begins", "second ends"]


# ---- approval is sticky


def test_only_an_explicit_no_takes_approval_back() -> None:
    def guard_of(function: Any) -> bool:
        return bool(Tool.from_function(function).options.requires_approval)

    guarded = tool(requires_approval=True)(plain_function())
    assert guard_of(tool(timeout=1.0)(guarded))
    assert guard_of(tool(requires_approval=None)(guarded))
    assert not guard_of(tool(requires_approval=False)(functools.partial(guarded)))
    assert guard_of(guarded), "what is said of a partial is not said of its function"
    assert not guard_of(tool(requires_approval=False)(guarded))
    assert guard_of(tool(requires_approval=True)(guarded))
    freed = Tool.from_function(guarded, ToolOptions(requires_approval=False))
    assert not freed.options.requires_approval
    [added] = AgentToolkit(freed)  # type: ignore[arg-type]
    assert not added.options.requires_approval


def test_what_is_said_again_goes_before_and_the_rest_stays() -> None:
    function = tool(timeout=3, terminate=True, max_concurrency=2, on_error="raise")(plain_function())
    tool(timeout=5, terminate=False, max_concurrency=None)(function)
    options = Tool.from_function(function).options
    assert (options.timeout, options.terminate, options.max_concurrency) == (5, False, None)
    assert options.on_error == "raise"


def test_one_decorator_for_two_functions_keeps_them_apart() -> None:
    guarded = tool(requires_approval=True)
    one, two = guarded(plain_function()), guarded(plain_function())
    tool(requires_approval=False)(one)
    assert not Tool.from_function(one).options.requires_approval
    assert Tool.from_function(two).options.requires_approval


class Guarded(AgentToolkit):
    @tool(requires_approval=True)
    def remove(self, path: str) -> str:
        return "removed"

    @staticmethod
    @tool(requires_approval=True)
    def static(path: str) -> str:
        return "removed"

    @classmethod
    @tool(requires_approval=True)
    def of_class(cls, path: str) -> str:
        return "removed"


def test_an_override_does_not_lose_approval_in_silence() -> None:
    class Below(Guarded):
        @tool(timeout=1.0)
        def remove(self, path: str) -> str:
            return super().remove(path)

        @tool
        @staticmethod
        def static(path: str) -> str:
            return "below"

        @tool(requires_approval=False)
        @classmethod
        def of_class(cls, path: str) -> str:
            return "below"

    found = {each.name: each.options for each in Below()}
    assert found["remove"].requires_approval
    assert found["remove"].timeout == 1.0
    assert found["static"].requires_approval
    assert not found["of_class"].requires_approval

    class Open(Guarded):
        def remove(self, path: str) -> str:
            return "below"

    assert "remove" not in Open(), "a tool only if it is marked"
    assert Tool.from_function(Open().remove).options.requires_approval
    assert Tool.from_function(
        type("Sub", (removing_class(tool(requires_approval=True)),), {"__call__": lambda s, p: p})()
    )


def test_a_subclass_that_overrides_a_guarded_call_stays_guarded() -> None:
    base = removing_class(tool(requires_approval=True))

    class Below(base):  # type: ignore[misc, valid-type]
        def __call__(self, path: str, root: str = "/") -> str:
            return str(super().__call__(path, root))

    assert Tool.from_function(Below()).options.requires_approval
    assert Tool.from_function(functools.partial(Below(), root="/")).options.requires_approval


def test_what_makes_the_instances_of_a_class_stays_guarded_below_it() -> None:
    class Removal:
        @tool(requires_approval=True)
        def __init__(self, path: str) -> None:
            self.path = path

    class Below(Removal):
        def __init__(self, path: str) -> None:
            super().__init__(path)

    class Silent(Removal):
        pass

    for each in (Removal, Silent, Below, functools.partial(Below)):
        assert Tool.from_function(each).options.requires_approval


def test_an_override_by_a_function_of_another_name_stays_guarded() -> None:
    def elsewhere(self: Any, path: str) -> str:
        return "below"

    class Below(Guarded):
        remove = elsewhere
        of_class = classmethod(lambda cls, path: "below")  # type: ignore[assignment]

    assert Tool.from_function(Below().remove).options.requires_approval
    assert Tool.from_function(Below().of_class, ToolOptions(name="of_class")).options.requires_approval


def with_retries(function: Any, path: str) -> Any:
    return function(path)


@dataclasses.dataclass
class Carrier:
    function: Any

    def __call__(self, path: str) -> Any:
        return self.function(path)


@dataclasses.dataclass(slots=True)
class SlottedCarrier(Carrier):
    pass


def without_wraps(function: Any) -> Any:
    def call(path: str) -> Any:
        return function(path)

    return call


CARRIERS: dict[str, Callable[[Any], Any]] = {
    "passed on by place": lambda inner: functools.partial(with_retries, inner),
    "passed on by name": lambda inner: functools.partial(with_retries, function=inner),
    "passed on twice": lambda inner: functools.partial(with_retries, functools.partial(with_retries, inner)),
    "in an object": Carrier,
    "in an object with slots": SlottedCarrier,
    "in a method's object": lambda inner: Carrier(Carrier(inner).__call__.__self__),
    "in a closure": without_wraps,
    "in a closure of a closure": lambda inner: without_wraps(without_wraps(inner)),
    "marked again": lambda inner: tool(timeout=5)(functools.partial(with_retries, inner)),
}


@pytest.mark.parametrize("name", CARRIERS)
async def test_what_has_a_guarded_function_in_hand_is_guarded(name: str) -> None:
    guarded = CARRIERS[name](tool(requires_approval=True)(plain_function()))
    agent = BaseAgent("A", "a", client=ScriptedModel([]))
    agent.add_tool(guarded, name="remove")
    assert (await agent.execute_tool("remove", path="x")).outcome == "denied"
    assert ran == []
    agent = BaseAgent("A", "a", client=ScriptedModel([]))
    agent.add_tool(Tool.from_function(guarded, ToolOptions(name="remove", requires_approval=False)))
    assert (await agent.execute_tool("remove", path="x")).outcome == "ok"


async def test_what_has_other_functions_in_hand_and_what_calls_a_guarded_one_is_asked_for_nothing() -> None:
    guarded = tool(requires_approval=True)(plain_function())

    @tool
    def clean_up(path: str) -> Any:
        return guarded(path)

    plain = plain_function()
    others = [clean_up, without_wraps(plain), Carrier(tool(plain)), functools.partial(with_retries, print)]
    for other in others:
        agent = BaseAgent("A", "a", client=ScriptedModel([])).add_tool(other, name="other")
        assert (await agent.execute_tool("other", path="x")).outcome == "ok"


def test_a_mark_that_gets_lost_is_refused() -> None:
    class Forgetful:
        def __call__(self, path: str) -> str:
            return path

        def __setattr__(self, name: str, value: Any) -> None:
            pass

    with pytest.raises(InvalidTool, match="cannot be marked"):
        tool(requires_approval=True)(Forgetful())


# ---- what a class holds


def test_partials_and_objects_of_a_class_are_tools_under_the_name_that_it_gives_them() -> None:
    marked = tool(requires_approval=True)(plain_function())

    class Kit(AgentToolkit):
        remove_srv = functools.partial(marked, root="/srv")
        remover = removing_class(tool(timeout=1.0))()

        @tool
        def look(self, path: str) -> str:
            return path

        look_here = functools.partialmethod(look, path=".")

    found = {each.name: each for each in Kit()}
    assert list(found) == ["remove_srv", "remover", "look", "look_here"]
    assert found["remove_srv"].options.requires_approval
    assert found["remover"].options.timeout == 1.0
    assert found["look_here"].parameters.json_schema["properties"] == {}


class Property(property):
    """As libraries derive them."""


@pytest.mark.parametrize("holder", [property, Property, functools.cached_property, functools.singledispatchmethod])
def test_what_cannot_be_called_by_name_is_refused_and_not_passed_over(holder: Any) -> None:
    class Kit(AgentToolkit):
        @holder
        @tool(requires_approval=True)
        def remove(self, path: str) -> str:
            raise AssertionError("nothing is run")

    with pytest.raises(InvalidTool, match=f"{holder.__name__} cannot be called by name: write a method"):
        Kit()


class Cached:
    """As caches for methods are: what it makes of a method does not show that `self` is given."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self.__wrapped__(*arguments)  # type: ignore[attr-defined]

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        wrapped = self.__wrapped__  # type: ignore[attr-defined]

        @functools.wraps(wrapped)
        def bound(*arguments: Any, **named: Any) -> Any:
            return wrapped(instance, *arguments, **named)

        return bound


def test_a_method_that_would_ask_the_model_for_self_is_refused() -> None:
    class Kit(AgentToolkit):
        @Cached
        @tool
        def look(self, path: str) -> str:
            return path

        @staticmethod
        @tool
        def static(path: str) -> str:
            return path

    with pytest.raises(InvalidTool, match="'look' cannot be a tool: its signature shows 'self'"):
        Kit()


async def test_agents_and_blocking_agents_hold_their_methods_to_it_too() -> None:
    def members(base: type) -> type:
        marked = tool(requires_approval=True)(plain_function())
        return type("Own", (base,), {"remove": staticmethod(functools.partial(marked, root="/srv"))})

    one = members(BaseAgent)("A", "a", approve=lambda call: False)
    assert (await one.execute_tool("remove", path="x")).outcome == "denied"
    two = members(sync.BaseAgent)("A", "a", approve=lambda call: False)
    assert (await in_thread(lambda: two.execute_tool("remove", path="x"))).outcome == "denied"
    assert ran == []


async def test_a_guarded_tool_of_a_delegate_in_a_thread_asks_too() -> None:
    marked = functools.partial(tool(requires_approval=True)(plain_function()), root="/srv")
    inner = keeper(marked)

    def ask() -> str:
        return outcomes(sync.run(inner, "go"))[0]

    model = ScriptedModel([answers.call("ask", {}), "done"])
    outer = BaseAgent("Boss", "b", client=model, approve=lambda call: False).add_tool(ask)
    result = await outer.run("go", limits=Limits(max_tool_calls=5))
    assert [each.content for each in result.tool_results] == ["denied"]
    assert ran == []
