"""The hooks and guards of an agent and of its runs: what they may be, and which of them hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast, overload

from fractal._concurrency.threads import current_thread_call
from fractal._engine.observers import is_same
from fractal._texts import repr_of
from fractal.around import Around, AroundHook, Guard, check_called
from fractal.errors import InvalidArguments

__all__ = [
    "NO_HOOKS",
    "Guards",
    "Hooks",
    "RunHooks",
    "awaited_or_joined",
    "checked_around",
    "checked_guards",
    "hooks_of",
]

Hook = TypeVar("Hook", bound=AroundHook)


@dataclass(frozen=True, slots=True)
class RunHooks:
    """The hooks around a run's tool calls and requests, the outermost first, and its guards."""

    around_tool: tuple[Around, ...] = ()
    around_model: tuple[Around, ...] = ()
    guards: tuple[Guard, ...] = ()

    def plus(self, inner: RunHooks) -> RunHooks:
        """The hooks of this object, with others inside of them."""
        return RunHooks(
            _once(self.around_tool + inner.around_tool),
            _once(self.around_model + inner.around_model),
            _without_repeats(self.guards + inner.guards),
        )

    def below(self, own: RunHooks) -> RunHooks:
        """The hooks that hold in a run below one that has these.

        Args:
            own: What that run has of its own.
        """
        passed_on = RunHooks(_for_delegates(self.around_tool), _for_delegates(self.around_model))
        return own if passed_on == NO_HOOKS else passed_on.plus(own)


NO_HOOKS = RunHooks()


def _once(hooks: tuple[Around, ...]) -> tuple[Around, ...]:
    """The hooks without repeats, each at its first position; one is for delegates if any of its repeats is.

    An agent that delegates to itself has all of them twice.
    """
    unique: list[Around] = []
    for hook in hooks:
        index = next((n for n, other in enumerate(unique) if is_same(hook.function, other.function)), None)
        if index is None:
            unique.append(hook)
        elif hook.delegates:
            unique[index] = hook
    return tuple(unique)


def _without_repeats(guards: tuple[Guard, ...]) -> tuple[Guard, ...]:
    return tuple(guard for n, guard in enumerate(guards) if not any(is_same(guard, other) for other in guards[:n]))


def _for_delegates(hooks: tuple[Around, ...]) -> tuple[Around, ...]:
    return tuple(hook for hook in hooks if hook.delegates)


def hooks_of(values: Mapping[str, Any]) -> RunHooks:
    """The hooks and guards among settings of an agent, or options of a run; `NO_HOOKS` itself if there are none."""
    hooks = RunHooks(
        checked_around("around_tool")(values.get("around_tool")),
        checked_around("around_model")(values.get("around_model")),
        checked_guards(values.get("guard")),
    )
    return NO_HOOKS if hooks == NO_HOOKS else hooks


def checked_around(name: str) -> Callable[[Any], tuple[Around, ...]]:
    """The hooks that are given, checked: one, or a list of functions and `Around(function, …)`.

    Args:
        name: What they are given as.
    """

    def check(given: Any) -> tuple[Around, ...]:
        what = "request" if name == "around_model" else "call"
        hooks: list[Around] = []
        for hook in _listed(name, given, Around):
            if not isinstance(hook, Around):
                check_called(hook, name, f"(ctx, {what}, next)")
            hooks.append(hook if isinstance(hook, Around) else Around(hook))
        return _once(tuple(hooks))

    return check


def checked_guards(given: Any) -> tuple[Guard, ...]:
    """The guards that are given, checked: one, or a list.

    Raises:
        InvalidArguments: One cannot be called with the run's context.
    """
    guards = tuple(_listed("guard", given))
    for guard in guards:
        check_called(guard, "guard", "(ctx)")
    return _without_repeats(guards)


def _listed(name: str, given: Any, *kinds: type[Any]) -> Iterable[Any]:
    if given is None:
        return ()
    if callable(given) or isinstance(given, kinds):
        return (given,)
    if isinstance(given, (list, tuple)):
        listed: Sequence[Any] = cast("Any", given)
        return listed
    raise InvalidArguments(f"{name}={repr_of(given)}: give a function, or a list of functions")


class Hooks(tuple[Around, ...]):
    """The hooks of an agent in their order, the outermost first; called with a function, as a decorator, it adds one.

    Example:
        >>> from fractal import BaseAgent
        >>> agent = BaseAgent("Guide", "You answer questions.")
        >>> @agent.around_tool
        ... async def audit(ctx, call, next):
        ...     print(call.tool_name, dict(call.arguments))
        ...     return await next()
        >>> len(agent.around_tool)
        1
    """

    _add: Callable[[Around], None]

    @classmethod
    def of(cls, hooks: Iterable[Around], add: Callable[[Around], None]) -> Hooks:
        """Make the hooks of an agent.

        Args:
            hooks: The hooks that there are.
            add: Called with one more.
        """
        made = cls(hooks)
        made._add = add
        return made

    @overload
    def __call__(self, function: Hook, /, *, delegates: bool = False) -> Hook: ...

    @overload
    def __call__(self, /, *, delegates: bool = False) -> Callable[[Hook], Hook]: ...

    def __call__(self, function: Any = None, /, *, delegates: bool = False) -> Any:
        """Add a hook, inside of the present ones, for runs that begin from now on.

        To add the same function once more changes nothing.

        Args:
            function: The hook. None: the decorator that adds one.
            delegates: Whether it holds in the runs below as well: of delegates, and of agents that tools ask.

        Returns:
            The function.

        Raises:
            InvalidArguments: It cannot be called so.
        """
        if function is None:
            return partial(self.__call__, delegates=delegates)
        self._add(Around(function, delegates))
        return function


class Guards(tuple[Guard, ...]):
    """The guards of an agent; called with a function, as a decorator, it adds one.

    Example:
        >>> from fractal import BaseAgent
        >>> agent = BaseAgent("Guide", "You answer questions.")
        >>> @agent.guard
        ... async def no_secrets(ctx):
        ...     if "password" in str(ctx.messages[-1]["content"]):
        ...         raise ValueError("it asks for a password")
        >>> len(agent.guard)
        1
    """

    _add: Callable[[Guard], None]

    @classmethod
    def of(cls, guards: Iterable[Guard], add: Callable[[Guard], None]) -> Guards:
        """Make the guards of an agent.

        Args:
            guards: The guards that there are.
            add: Called with one more.
        """
        made = cls(guards)
        made._add = add
        return made

    def __call__(self, function: Hook, /) -> Hook:
        """Add a guard, for runs that begin from now on.

        To add the same function once more changes nothing.

        Args:
            function: The guard.

        Returns:
            The function.

        Raises:
            InvalidArguments: It cannot be called so.
        """
        self._add(function)
        return function


def awaited_or_joined(function: Callable[[], Any]) -> Any:
    """Call an async function for a hook: something to await, or, in the thread of a plain hook, what it returned."""
    thread = current_thread_call.get()
    return thread.join(function) if thread is not None and thread.is_here else function()
