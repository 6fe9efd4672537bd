"""How agents are built: what their constructor is given, what their class says in its body, and what is neither."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, cast, get_args, get_origin

from fractal._agent.core import CORE
from fractal._agent.settings import FIXED, SETTINGS, Setting
from fractal._functions.signature import arguments_of, variables_of, zipped
from fractal._texts import kind_of, one_line, repr_of
from fractal.errors import InvalidArguments
from fractal.results import Content_co

__all__ = ["answers_of", "check_settings", "constructor", "known_setting", "take_settings"]

_NAMES = frozenset({*SETTINGS, "toolkit"})

Init = TypeVar("Init", bound=Callable[..., None])

_MEANT = {
    **dict.fromkeys(("instructions", "prompt", "system", "system_message"), "it is system_prompt="),
    **dict.fromkeys(("result_type", "response_format", "output_schema"), "it is output_type="),
    **dict.fromkeys(("hooks", "callbacks"), "it is observers= to look on, around_tool= and around_model= to take part"),
    **dict.fromkeys(("middleware", "middlewares"), "it is around_tool= and around_model="),
    **dict.fromkeys(("guards", "guardrails", "input_guardrails"), "it is guard="),
    **dict.fromkeys(("agents", "handoffs", "sub_agents"), "call agent.register_delegate(other)"),
    **dict.fromkeys(("deps", "messages", "history"), "it goes to each run: agent.run(…, deps=…, messages=…)"),
    **dict.fromkeys(("top_p", "seed", "stop", "frequency_penalty", "presence_penalty"), "give extra_body={…: …}"),
    "base_url": "give client=OpenAIModel(base_url=…), or set OPENAI_BASE_URL",
    "api_key": "give client=OpenAIModel(api_key=…), or set OPENAI_API_KEY",
    "tools": "mark methods with @tool, call agent.add_tool(function), or give toolkit=AgentToolkit(function, …)",
    "max_iterations": "give limits=Limits(max_iterations=…), or max_iterations= to each run",
    "model_settings": "give temperature=, max_tokens=, reasoning_effort= and extra_body=",
}


def constructor(init: Init) -> Init:
    """Make a constructor of agents name what is wrong with its arguments, and use the defaults of the class.

    Args:
        init: It; all it takes are settings of agents, and `toolkit`.
    """
    signature = inspect.signature(init)
    parameters = {name: each for name, each in signature.parameters.items() if name != "self"}
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    needed = [name for name, each in parameters.items() if each.default is each.empty]

    @functools.wraps(init)
    def build(self: Any, *arguments: Any, **named: Any) -> None:
        kind = kind_of(self)
        if len(arguments) > len(positional):
            raise InvalidArguments(
                f"{kind.__name__} takes {', '.join(positional)} by position, and all else by name, as in timeout=30"
            )
        check_settings(kind)
        given = dict(zip(positional, arguments, strict=False))
        for name, value in named.items():
            if name in given:
                raise InvalidArguments(f"{kind.__name__} is given {name} twice, by position and by name")
            if name not in parameters:
                raise InvalidArguments(_no_such(name, kind, parameters))
            given[name] = value
        given |= {name: value for name, value in _said_by(kind, parameters).items() if given.get(name) is None}
        missing = [name for name in needed if name not in given]
        if missing:
            raise InvalidArguments(f"{kind.__name__} is not given {' and '.join(missing)}: every agent has {_LIST}")
        init(self, **given)

    return cast("Init", build)


_LIST = 'a name and a prompt, as in BaseAgent("Guide", "You answer questions about museums.")'


def _no_such(name: str, kind: type, parameters: Mapping[str, object]) -> str:
    close = get_close_matches(name, parameters, 1)
    hint = _MEANT.get(name) or (f"did you mean {close[0]}=?" if close else f"it has {', '.join(parameters)}")
    return f"{kind.__name__} has no setting {name}=: {hint}"


def known_setting(name: str, kind: type[Any]) -> str:
    """The name of a setting.

    Raises:
        InvalidArguments: There is none of that name; says what to write instead.
    """
    if name not in SETTINGS and name != "toolkit":
        raise InvalidArguments(_no_such(name, kind, SETTINGS))
    return name


def take_settings(kind: type[Any]) -> None:
    """Take the settings that a new class of agents has in its body.

    Raises:
        InvalidArguments: A method or property of it has the name of a setting.
    """
    for name in (*SETTINGS, "toolkit"):
        above = _setting(kind, name)
        value: Any = next(vars(each)[name] for each in kind.__mro__ if name in vars(each))  # mixins hold some, too
        if value is above:
            continue
        form = kind_of(value)
        if hasattr(form, "__get__"):
            raise InvalidArguments(
                f"{kind.__name__}.{name} is a {form.__name__}, and {name} is a setting of every agent: give"
                f" yours another name. super().__init__({name}=…) and agent.{name} = … give it a value"
            )
        setattr(kind, name, above.with_default(value))
    for base in vars(kind).get("__orig_bases__", ()):
        if "output_type" not in vars(kind) and (answers := answers_of(base)) is not None:
            kind.output_type = _setting(kind, "output_type").with_default(answers)


def check_settings(kind: type[Any]) -> None:
    """Refuse a class of agents with a setting hidden by a later attribute of the class.

    Raises:
        InvalidArguments: One is; says what to do instead.
    """
    seen: set[str] = set()
    for each in kind.__mro__:
        held: Mapping[str, Any] = vars(each)
        if CORE in held:  # the class that has them all
            return
        if _NAMES.isdisjoint(held):
            continue
        for name in _NAMES.intersection(held) - seen:
            if not _is_setting(held[name]):
                raise InvalidArguments(
                    f"{each.__name__}.{name} = {one_line(repr_of(held[name]), 100)} was said after the class was made,"
                    f" and hides a setting: say it in the body of the class, or assign it to an agent: agent.{name} = …"
                )
            seen.add(name)


def answers_of(form: object) -> Any:
    """The output type in `BaseAgent[Order]`, or in a generic class below it; None for other types, and without one."""
    kind: Any = get_origin(form)
    root = next((each for each in getattr(kind, "__mro__", ()) if _parameters_of(each) == (Content_co,)), None)
    if root is None:
        return None
    answers = arguments_of(kind, root, zipped(kind, get_args(form))).get(Content_co)
    return None if answers is Any or variables_of(answers) else answers


def _parameters_of(kind: type) -> tuple[Any, ...]:
    return getattr(kind, "__parameters__", ())


def _setting(kind: type[Any], name: str) -> Setting[Any, Any]:
    return next(vars(each)[name] for each in kind.__mro__ if _is_setting(vars(each).get(name)))


def _is_setting(value: object) -> bool:
    return isinstance(value, Setting)


def _said_by(kind: type[Any], names: Iterable[str]) -> dict[str, Any]:
    """The value of a name in the body of a class, or of a class above it."""
    found = ((name, getattr(kind, name)) for name in names if name not in FIXED)
    return {name: value for name, value in found if not isinstance(value, Setting)}
