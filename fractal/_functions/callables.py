"""What stands behind a callable: partials, methods, wrappers and objects, down to the function that is called.

Attributes are looked up without running anything of an object. Only of one that is offered, a property and the
`__getattr__` of a proxy are asked too, as `inspect.signature` does; never of what a class happens to hold.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

from fractal._texts import kind_of

__all__ = [
    "attribute_of",
    "bound_names",
    "core_of",
    "described",
    "fixed_names",
    "has_overridden",
    "held_by",
    "hides_receiver",
    "is_async",
    "is_async_generator",
    "is_object",
    "is_plain",
    "layers",
    "name_of",
    "path_of",
    "receiver_of",
    "unbound",
]

_Kinds = tuple[type[Any], ...]

_PARTIALS: _Kinds = (functools.partial, functools.partialmethod)
_METHODS: _Kinds = (types.MethodType, staticmethod, classmethod)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_MAKERS = ("__new__", "__init__")
# What holds a function, though nobody can call it as it is.
_HOLDERS: dict[type[Any], str] = {
    property: "fget",
    functools.cached_property: "func",
    functools.singledispatchmethod: "func",
}


def attribute_of(layer: Any, name: str, *, asks: bool = True) -> Any:
    """An attribute as stored in an object or its class; or None.

    Args:
        layer: The object.
        name: Name of the attribute.
        asks: Whether a property is run, and the `__getattr__` of a proxy.
    """
    if type(layer) is types.FunctionType:  # nearly all are, and their dictionary says all
        return layer.__dict__.get(name)
    found = inspect.getattr_static(layer, name, None)
    if isinstance(found, _SLOTS):  # of a proxy, say, that is written in C
        try:
            return found.__get__(layer, kind_of(layer))
        except AttributeError:
            return None
    if asks and (isinstance(found, property) or (found is None and _is_proxy(layer))) and not inspect.isclass(layer):
        return _answer_of(layer, name)
    return found


def _is_proxy(layer: Any) -> bool:
    return inspect.getattr_static(kind_of(layer), "__getattr__", None) is not None


def _answer_of(layer: Any, name: str) -> Any:
    try:
        answer = getattr(layer, name)
    except Exception:  # whatever a class of the user's does about attributes
        return None
    # Stubs of remote objects answer to any name with one more of themselves.
    return None if kind_of(answer) is kind_of(layer) else answer


def layers(function: Any, *, asks: bool = True) -> list[Any]:
    """A callable and its layers from the outside in; of a class's attributes also those not callable yet.

    Args:
        function: The callable.
        asks: As in `attribute_of`.
    """
    if type(function) is types.FunctionType and not function.__dict__:  # most of what a class has
        return [function]
    found: list[Any] = []
    pending = [function]
    while pending:
        layer = pending.pop()
        if all(layer is not each for each in found):
            found.append(layer)
            pending += reversed(_makers_of(layer) if inspect.isclass(layer) else _inner(layer, asks=asks))
    return found


def path_of(function: Any) -> Iterator[Any]:
    """A callable and, one by one, the callables that its call is handed on to."""
    seen: list[Any] = []
    inner = [function]
    while inner and all(inner[0] is not each for each in seen):
        seen.append(inner[0])
        yield inner[0]
        inner = _inner(inner[0])


def unbound(function: Any) -> Any:
    """The function inside a method, or a static or class method; anything else as it is."""
    return function.__func__ if _is(function, _METHODS) else function


def core_of(function: Any) -> Any:
    """The function that a call comes to in the end; of a proxy that does not show its function, the proxy."""
    *path, last = path_of(function)
    return path[-1] if path and _is_proxy(path[-1]) and last is _call_of(path[-1]) else last


def receiver_of(function: Any) -> Any:
    """The object that a method is bound to, or the callable object itself; None for a plain function."""
    for layer in path_of(function):
        if _is(layer, _METHODS[:1]):
            return layer.__self__
        if is_object(layer):
            return layer
    return None


def is_async(function: Any) -> bool:
    """Whether calling a function, a partial or method of one, or a callable object gives something to await."""
    return any(map(inspect.iscoroutinefunction, _called_functions(function)))


def is_plain(function: Callable[..., Any]) -> bool:
    """Whether a function has finished when it returns: neither async nor a generator, in any form."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = cast("Any", inner.func)
    forms = [inner] if inspect.isroutine(inner) else [inner, cast("Any", type(inner)).__call__]
    return not any(map(_is_lazy, forms))


def _is_lazy(form: Any) -> bool:
    try:
        return any(is_lazy(form) for is_lazy in _LAZY)
    except Exception:  # it asks a user's object for attributes
        return False


_LAZY = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


def is_async_generator(function: Any) -> bool:
    """Whether calling a function, or what ends in one, gives an async generator."""
    return any(map(inspect.isasyncgenfunction, _called_functions(function)))


def name_of(function: Any) -> str:
    """The name of a function, or of what a partial or method ends in; that of its class for any other object."""
    for layer in path_of(function):
        if _is(layer, _METHODS) or _partial_method_of(layer) is not None:
            continue  # the function behind it has the name
        if inspect.isclass(layer) or _is_function(layer):
            return layer.__name__ if layer.__name__.isidentifier() else type(layer).__name__
        own = attribute_of(layer, "__name__")
        if isinstance(own, str) and own.isidentifier():
            return own
        if is_object(layer):
            return type(layer).__name__
    return type(function).__name__


def bound_names(function: Any) -> set[str]:
    """The parameters that partials on the way bind by name, as far as a signature of its own does not offer them."""
    names: set[str] = set()
    for layer in path_of(function):
        if attribute_of(layer, "__signature__") is not None:
            break
        if _is(layer, _PARTIALS):
            names |= layer.keywords.keys()
    return names


def fixed_names(function: Any) -> set[str]:
    """All names that some function on the way would take for a parameter of its own, offered or not."""
    names: set[str] = set()
    for layer in path_of(function):
        if _is(layer, _PARTIALS):
            names |= layer.keywords.keys()
        elif _is_function(layer):
            names |= _named_parameters(layer)
    return names


def described(function: Any) -> Any:
    """The callable in the form that `inspect.signature` reads.

    That passes over a partial that has the `__wrapped__` of its function, and so over what the partial binds.
    """
    if inspect.isclass(function) or attribute_of(function, "__signature__") is not None:
        return function
    if _is(function, _PARTIALS[:1]):
        return functools.partial(described(function.func), *function.args, **function.keywords)
    if _is(function, _METHODS[:1]):
        return types.MethodType(described(function.__func__), function.__self__)
    wrapped = attribute_of(function, "__wrapped__")
    if callable(wrapped):
        return described(wrapped)
    call = _call_of(function)
    if _is(call, (staticmethod, functools.partial)):  # it has no parameter for the object
        return described(unbound(call))
    return function


def hides_receiver(method: Any, attribute: Any) -> bool:
    """Whether the signature of a method has a parameter for the object, which is given already.

    Args:
        method: What an object has.
        attribute: What its class has under that name.
    """
    core, path = core_of(attribute), list(path_of(method))
    is_found = path[-1] is core and type(core) is types.FunctionType and method is not attribute
    steps = (*path, *path_of(attribute))
    return is_found and not any(_is(step, (types.MethodType, staticmethod, *_PARTIALS)) for step in steps)


def has_overridden(layer: Any) -> list[Any]:
    """What a callable is in its class, and what that overrides: a method, `__call__`, or what makes instances."""
    if inspect.isclass(layer):
        return [vars(kind)[name] for name in _MAKERS for kind in layer.__mro__ if name in vars(kind)]
    if _is(layer, _METHODS[:1]):
        owner = layer.__self__ if inspect.isclass(layer.__self__) else kind_of(layer.__self__)
        name = _name_in(owner, layer.__func__)
    elif _call_of(layer) is not None:
        owner, name = kind_of(layer), "__call__"
    else:
        return []
    return [vars(kind)[name] for kind in owner.__mro__ if name in vars(kind)]


def held_by(layer: Any) -> list[Any]:
    """The callables that a callable may call: what a partial passes on, what a callable object or a closure holds."""
    held: list[Any] = []
    if _is(layer, _PARTIALS):
        held = [*layer.args, *layer.keywords.values()]
    elif type(layer) is types.FunctionType:
        for cell in layer.__closure__ or ():
            with suppress(ValueError):  # it has no value yet
                held.append(cell.cell_contents)
    elif is_object(layer):
        slots = [name for kind in kind_of(layer).__mro__ for name, each in vars(kind).items() if _is(each, _SLOTS[:1])]
        held = [*_dictionary_of(layer).values(), *(attribute_of(layer, name, asks=False) for name in slots)]
    return [each for each in held if callable(each)]


def _dictionary_of(value: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def _name_in(owner: type, function: Any) -> str:
    """The name that a class has for one of its functions, which may not be the function's own."""
    name = str(getattr(function, "__name__", ""))
    if unbound(inspect.getattr_static(owner, name, None)) is function:
        return name
    held = ((key, value) for kind in owner.__mro__ for key, value in vars(kind).items())
    return next((key for key, value in held if unbound(value) is function), name)


def _makers_of(kind: type) -> list[Any]:
    """The functions, written in Python, that a call of a class comes to."""
    return [made for name in _MAKERS if type(made := unbound(getattr(kind, name))) is types.FunctionType]


def _inner(layer: Any, *, asks: bool = True) -> list[Any]:
    """The callables that a layer passes its calls on to, the final one first."""
    kind = kind_of(layer)
    if issubclass(kind, _PARTIALS):
        return [layer.func]
    if issubclass(kind, _METHODS):
        return [layer.__func__]
    holder = next((name for held, name in _HOLDERS.items() if issubclass(kind, held)), None)
    if holder is not None:
        return [getattr(layer, holder)]
    if kind is weakref.CallableProxyType:
        return [layer.__call__.__self__]
    if issubclass(kind, type) or not (callable(layer) or hasattr(kind, "__get__")):
        return []
    wrapped = attribute_of(layer, "__wrapped__", asks=asks)
    bound = _bound_in(layer, asks=asks)
    inner = (_partial_method_of(layer), wrapped, bound, _call_of(layer), *_implementations(layer))
    return [each for each in inner if callable(each) or _is(each, (*_METHODS, *_PARTIALS))]


def _is(layer: Any, kinds: _Kinds) -> bool:
    return isinstance(layer, kinds)


def _called_functions(function: Any) -> Iterator[Any]:
    """The callables that a call is handed on to with the answer untouched; objects are not looked at."""
    layer = function
    while layer is not None:
        if _is(layer, _PARTIALS):
            layer = layer.func
        elif _is(layer, _METHODS):
            layer = layer.__func__
        elif _call_of(layer) is not None:
            layer = _call_of(layer)
        else:
            yield layer
            layer = _partial_method_of(layer)


def _implementations(layer: Any) -> list[Any]:
    """The functions that a function of `functools.singledispatch` chooses from."""
    registry = attribute_of(layer, "registry", asks=False)
    return [*cast("Mapping[Any, Any]", registry).values()] if isinstance(registry, types.MappingProxyType) else []


def _bound_in(layer: Any, *, asks: bool) -> Any:
    """The function that a partial of another make calls, or None."""
    is_partial = isinstance(attribute_of(layer, "keywords", asks=asks), dict)
    return attribute_of(layer, "func", asks=asks) if is_partial else None


def _partial_method_of(layer: Any) -> Any:
    """The partialmethod that a function was made of, or None."""
    if type(layer) is not types.FunctionType or not layer.__dict__:
        return None
    return layer.__dict__.get("__partialmethod__", layer.__dict__.get("_partialmethod"))


def is_object(layer: Any) -> bool:
    """Whether a layer is an object that is called by its class's `__call__`, and no wrapper of something else."""
    return _call_of(layer) is not None and not callable(attribute_of(layer, "__wrapped__"))


def _call_of(layer: Any) -> Any:
    """The `__call__` that an object's class defines in Python; None for functions, methods, partials and classes."""
    kind = kind_of(layer)
    if issubclass(kind, (type, types.FunctionType, *_METHODS, *_PARTIALS)):
        return None
    call = inspect.getattr_static(kind, "__call__", None)
    return None if isinstance(call, types.WrapperDescriptorType) else call


def _is_function(layer: Any) -> bool:
    return isinstance(layer, (types.FunctionType, types.BuiltinFunctionType)) or (
        # Functions of other makes, compiled ones say, look like Python's.
        inspect.isroutine(layer) and _call_of(layer) is None and isinstance(getattr(layer, "__name__", None), str)
    )


def _named_parameters(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (ValueError, TypeError, NameError):
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
