"""An agent seen as a tool of another agent."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from fractal._agent import verbs
from fractal._agent.core import AnyAgent, core_of
from fractal._concurrency.current import current_run
from fractal._copies import copied, with_own_content
from fractal._functions.docstring import Documentation
from fractal._functions.schema import schema_of
from fractal._json import is_mapping, text_of
from fractal.errors import ApprovalPending, DelegateFailed, InvalidArguments
from fractal.events import DelegationFinished, DelegationStarted
from fractal.toolkit import DELEGATE, FOR_ANOTHER, Tool, ToolOptions

if TYPE_CHECKING:
    from fractal._engine.run import Run
    from fractal.results import AgentResult

__all__ = ["ask_delegate", "delegate_tool", "run_delegate"]

_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, list, dict)},
    **{"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict},
}
_KEYS = frozenset({"type", "description", "required", "default"})


def delegate_tool(
    delegate: AnyAgent,
    tool_name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Tool:
    """Make a tool that asks another agent.

    Args:
        delegate: The agent.
        tool_name: Name the model sees. None: `delegate_to_` and the agent's name.
        description: What the model is told it does. None: a sentence with the agent's name.
        parameters: Structured input, as `{"sql": {"type": "str", "description": "…", "required": False}}`; the
            delegate gets the dict. None: one parameter, `query`.

    Raises:
        TypeError: `parameters` is not of that form; says where.
    """
    core_of(delegate)
    if description is not None and not isinstance(description, str):
        raise InvalidArguments(f"description={description!r}: give text, or None")
    name = f"delegate_to_{_identifier(delegate.name)}" if tool_name is None else tool_name
    description = description or f"Hand a question to the agent {delegate.name!r} and get its answer."
    function = _asking(delegate, parameters)
    checked = schema_of(function, name=name, documentation=Documentation(), is_context=lambda _: False)
    return Tool(name, description, function, checked, True, ToolOptions(name=name, after_crash="repeat"))


def _asking(delegate: AnyAgent, parameters: Mapping[str, Mapping[str, Any]] | None) -> Callable[..., Any]:
    """A function that asks another agent, and can be copied for yet another one."""
    function = _asking_one(delegate) if parameters is None else _asking_structured(delegate, parameters)
    function.__annotations__.pop("return", None)
    vars(function).update({DELEGATE: delegate, FOR_ANOTHER: functools.partial(_asking, parameters=parameters)})
    return function


def _asking_one(delegate: AnyAgent) -> Callable[..., Any]:
    async def ask_one(query: str) -> Any:
        return await ask_delegate(delegate, query)

    return ask_one


def _asking_structured(delegate: AnyAgent, parameters: Mapping[str, Mapping[str, Any]]) -> Callable[..., Any]:
    names = _names_of(parameters)
    signature = inspect.Signature([_parameter(name, names[name], facts) for name, facts in parameters.items()])
    defaults = {name: facts["default"] for name, facts in parameters.items() if "default" in facts}

    async def ask_structured(**arguments: Any) -> Any:
        given = {name: arguments[ours] for name, ours in names.items() if ours in arguments}
        return await ask_delegate(delegate, {**defaults, **given})

    ask_structured.__signature__ = signature  # type: ignore[attr-defined]
    return ask_structured


async def ask_delegate(delegate: AnyAgent, query: object) -> Any:
    """Run a delegate inside the current run and give back its answer.

    Raises:
        DelegateFailed: It ended without one; says why, and what it last said.
    """
    run = current_run.get()
    result = await run_delegate(delegate, query, run)
    if isinstance(result.exception, ApprovalPending):  # not an end: the run above waits with it
        raise result.exception
    if not result.success:
        error = DelegateFailed(delegate.name, _known(delegate, result))
        error.result = result
        raise error from result.exception
    return result.content


async def run_delegate(delegate: AnyAgent, query: object, run: Run | None) -> AgentResult:
    """Run a delegate as a child of a run, and tell that run's observers."""
    core_of(delegate)  # whatever it is told of has a name
    if run is None:
        return await verbs.ask(delegate, query)
    result: AgentResult | None = None
    facts: dict[str, Any] = {"call_id": run.open_call_id(), "to_agent": delegate.name}
    await run.emitter.pace()
    run.emitter.emit(DelegationStarted, query=copied(query) if run.emitter.has_listeners else query, **facts)
    try:
        await run.emitter.pace()
        result = await verbs.ask(delegate, query)
        await run.emitter.pace_in_time()
        return result
    finally:
        shown = with_own_content(result) if result is not None and run.emitter.has_listeners else result
        run.emitter.emit(DelegationFinished, result=shown, **facts)


def _known(delegate: AnyAgent, result: AgentResult) -> str:
    """The reason why a delegate failed, and the last text of it."""
    said = [text_of(m["content"]) for m in result.messages if m["role"] == "assistant" and m.get("content")]
    last = f" Its last words: {said[-1][:500]}" if said and result.stop_reason != "refusal" else ""
    return f"agent {delegate.name!r} gave no answer ({result.stop_reason}): {result.error}.{last}"


def _identifier(name: str) -> str:
    # The characters that endpoints allow in the name of a function.
    return re.sub(r"[^a-z0-9_-]", "_", name.lower())[:52]


def _names_of(parameters: object) -> dict[str, str]:
    """The Python name of each parameter: JSON has names that Python has not, such as `class` and `max-rows`."""
    if not is_mapping(parameters):
        raise TypeError(f"parameters is a dict of name to description, not {type(parameters).__name__}")
    names: dict[str, str] = {}
    for name in parameters:
        if not isinstance(name, str) or not name:
            raise TypeError(f"parameters: {name!r} is no parameter name")
        ours = name
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            ours = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") + "_"
            ours = ours if ours.isidentifier() else f"p_{ours}"
            while ours in parameters or ours in names.values():
                ours += "_"
        names[name] = ours
    return names


def _parameter(name: str, ours: str, facts: object) -> inspect.Parameter:
    if not is_mapping(facts):
        raise TypeError(f'parameters[{name!r}] is a dict such as {{"type": "str"}}, not {type(facts).__name__}')
    unknown = set(facts) - _KEYS
    if unknown:
        raise TypeError(f"parameters[{name!r}] has {sorted(unknown)}: it takes {sorted(_KEYS)}")
    kind = facts.get("type", "str")
    if not isinstance(kind, type) and not (isinstance(kind, str) and kind in _TYPES):
        raise TypeError(f"parameters[{name!r}]['type'] is {kind!r}: give one of {sorted(_TYPES)}")
    required = facts.get("required", "default" not in facts)
    if not isinstance(required, bool):
        raise TypeError(f"parameters[{name!r}]['required'] is {required!r}: give True or False")
    description = facts.get("description")
    if description is not None and not isinstance(description, str):
        raise TypeError(f"parameters[{name!r}]['description'] is {description!r}: give text")
    hint = kind if isinstance(kind, type) else _TYPES[kind]
    shown = Field(description=description) if ours == name else Field(description=description, alias=name)
    default = inspect.Parameter.empty if required else facts.get("default")
    if facts.get("default") is not None and hint in _TYPES.values() and not _fits(facts["default"], hint):
        raise TypeError(f"parameters[{name!r}]['default'] is {facts['default']!r}, which does not fit {kind!r}")
    return inspect.Parameter(
        ours,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint if required or default is not None else hint | None, shown],
    )


def _fits(value: object, hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True
