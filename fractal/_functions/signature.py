"""The parameters of a callable, and their annotations as types."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typing_extensions
from pydantic import Field
from pydantic.fields import FieldInfo

from fractal._functions.callables import attribute_of, bound_names, core_of, described, path_of, receiver_of
from fractal._texts import kind_of

__all__ = [
    "SignatureFault",
    "arguments_of",
    "read_signature",
    "type_arguments",
    "type_hints",
    "variables_of",
    "with_types",
    "zipped",
]

Types = Mapping[Any, Any]
"""What type variables stand for."""


class SignatureFault(ValueError):
    """A signature cannot be read; the text says why."""


def read_signature(
    function: Callable[..., Any], known_names: Mapping[str, Any] | None = None
) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters of a function that its caller may give, with their types, by name.

    Args:
        function: The function as it will be called: bound, if it is a method.
        known_names: Names that annotations may use even if their module has imported them for type checkers only.

    Raises:
        SignatureFault: It has no signature, or an annotation is no type.
    """
    try:
        parameters = inspect.signature(described(function)).parameters.values()
    except (ValueError, TypeError, RecursionError) as error:
        raise SignatureFault(f"its signature cannot be read ({error}): wrap it in a function") from None
    except NameError as error:  # annotations are evaluated late from Python 3.14 on
        raise SignatureFault(_unknown_name(error)) from None
    bound = bound_names(function)
    signature = [parameter for parameter in parameters if parameter.name not in bound]
    annotations = {p.name: p.annotation for p in signature if p.annotation is not p.empty}
    namespace = {**(known_names or {}), **_namespace_of(function)}
    hints = type_hints(annotations, namespace)
    for name, text in _descriptions_of(core_of(function)).items():
        if name in hints:
            hints[name] = Annotated[hints[name], Field(description=text)]
    arguments = type_arguments(function)
    if arguments:
        hints = {name: with_types(hint, arguments) for name, hint in hints.items()}
        below = kind_of(receiver_of(function))
        hints = type_hints(hints, {**namespace, **_module_of(below)})
    return signature, hints


def type_hints(annotated: Any, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Annotations as types.

    Args:
        annotated: The annotations by name, or a class that has them.
        namespace: The names that they may use. None: those of the class's module.

    Raises:
        SignatureFault: One is no type.
    """
    holder = types.SimpleNamespace(__annotations__=annotated) if isinstance(annotated, dict) else annotated
    try:
        return typing_extensions.get_type_hints(holder, globalns=namespace, include_extras=True)
    except NameError as error:
        raise SignatureFault(_unknown_name(error)) from None
    except (TypeError, SyntaxError) as error:
        raise SignatureFault(f"an annotation is no type: {error}") from None


def _descriptions_of(kind: Any) -> dict[str, str]:
    """The descriptions of a pydantic class's fields, which its signature leaves out."""
    fields: dict[str, FieldInfo] = getattr(kind, "__pydantic_fields__", {}) if inspect.isclass(kind) else {}
    names = ((each.alias or name, each.description) for name, each in fields.items())
    return {name: text for name, text in names if text is not None}


def type_arguments(function: Callable[..., Any]) -> Types:
    """The types for the type variables of a generic class, in a method of an instance."""
    receiver, core = receiver_of(function), core_of(function)
    below = kind_of(receiver)
    if receiver is None or issubclass(below, type):
        return {}
    owners = (kind for kind in below.__mro__ if getattr(kind, "__parameters__", ()))
    owner = next((kind for kind in owners if _defines(kind, core)), None)
    if owner is None:
        return {}
    alias = attribute_of(receiver, "__orig_class__")  # of `Kit[int]()`
    return arguments_of(below, owner, zipped(below, get_args(alias)))


def _defines(kind: type, core: Any) -> bool:
    return core_of(vars(kind).get(getattr(core, "__name__", ""))) is core


def arguments_of(kind: type, base: type, arguments: Types) -> Types:
    """The arguments of a generic base class, as a class below gives them."""
    if kind is base:
        return arguments
    for written in vars(kind).get("__orig_bases__", kind.__bases__):
        above = get_origin(written) or written
        if inspect.isclass(above) and base in above.__mro__:
            given = [with_types(each, arguments) for each in get_args(written)]
            return arguments_of(above, base, zipped(above, given))
    return {}


def zipped(kind: type, given: Sequence[Any]) -> Types:
    """The arguments of a generic class, by its own type variables; none if there are not as many."""
    parameters: tuple[Any, ...] = getattr(kind, "__parameters__", ())
    return dict(zip(parameters, given, strict=True)) if len(parameters) == len(given) else {}


def with_types(hint: Any, arguments: Types) -> Any:
    """A type with its type variables replaced."""
    if isinstance(hint, TypeVar):
        return arguments.get(hint, hint)
    parameters = variables_of(hint)
    return hint[tuple(arguments.get(each, each) for each in parameters)] if parameters else hint


def variables_of(hint: Any) -> tuple[Any, ...]:
    """The type variables that a type still has; none for a generic class that nothing was given to."""
    if isinstance(hint, TypeVar):
        return (hint,)
    generic = getattr(hint, "__pydantic_generic_metadata__", None)
    if generic is not None:
        return generic["parameters"] if generic["origin"] is not None else ()
    return getattr(hint, "__parameters__", ()) if not inspect.isclass(hint) or get_origin(hint) else ()


def _namespace_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The names visible in a function: those of its module, and of the functions around it."""
    namespace: dict[str, Any] = {}
    for layer in path_of(function):
        namespace |= _module_of(layer) if inspect.isclass(layer) else getattr(layer, "__globals__", {})
    return namespace


def _module_of(kind: type) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    return vars(module) if module is not None else {}


def _unknown_name(error: NameError) -> str:
    return f"an annotation names {error.name!r}, which its module does not know: define or import it at module level"
