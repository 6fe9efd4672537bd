"""Hooks around tool calls and requests to the model, guards of whole runs, and what they are shown."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from fractal._copies import copied, is_untouched
from fractal._functions.callables import described, is_async, is_plain
from fractal._texts import repr_of
from fractal.errors import InvalidArguments

if TYPE_CHECKING:
    from fractal.approval import PendingCall
    from fractal.messages import Message
    from fractal.model import Reply
    from fractal.results import ToolResult

__all__ = [
    "Around",
    "AroundHook",
    "Guard",
    "NextCall",
    "NextRequest",
    "PendingRequest",
    "Shown",
    "check_called",
    "is_changed",
]

AroundHook = Callable[..., Any]
"""A function `(ctx, call, next)` around each tool call, or `(ctx, request, next)` around each request to the model.

An async one awaits `next(…)`. A plain one runs in a worker thread, where `next(…)` blocks."""

Guard = Callable[..., Any]
"""A function of the run's `RunContext`, plain or async, that raises to stop the run."""


class NextCall(Protocol):
    """The callable that a hook around tool calls goes on with: the inner hooks, and then the tool.

    Called without arguments it makes the call as the hook was shown it. It may be called several times.
    """

    def __call__(self, call: PendingCall | None = None, /) -> Awaitable[ToolResult]:
        """Make the call.

        Args:
            call: The call with other arguments, which are checked as the model's are.

        Returns:
            How it ended: what the tool raised is in it. In a plain hook it need not be awaited.

        Raises:
            InvalidArguments: It is another tool's call, or the hook has ended.
        """
        ...


class NextRequest(Protocol):
    """The callable that a hook around requests goes on with: the inner hooks, and then the model, with retries.

    Called without arguments it sends what the hook was shown. It may be called several times, one after the other.
    """

    def __call__(self, request: PendingRequest | None = None, /) -> Awaitable[Reply]:
        """Send the request.

        Args:
            request: What to send in place of it.

        Returns:
            The reply. In a plain hook it need not be awaited.

        Raises:
            ModelError: There is no usable answer.
            InvalidArguments: The request cannot be sent, or the hook has ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Around:
    """A hook with options; where there are none, the bare function will do.

    Args:
        function: The hook.
        delegates: Whether it holds in the runs below as well: of delegates, and of agents that tools ask.

    Raises:
        InvalidArguments: The function cannot be called so.

    Example:
        >>> async def audit(ctx, call, next):
        ...     print(call.tool_name)
        ...     return await next()
        >>> Around(audit, delegates=True).delegates
        True
    """

    function: AroundHook
    delegates: bool = False

    def __post_init__(self) -> None:
        check_called(self.function, "a hook", "(ctx, call, next), or (ctx, request, next) around requests")
        if not isinstance(self.delegates, bool):
            raise InvalidArguments(f"delegates={repr_of(self.delegates)}: give True or False")


def check_called(function: Any, what: str, form: str) -> None:
    """Refuse a function that cannot be called with the arguments of the library.

    Args:
        function: What is given as a function.
        what: What it is for.
        form: What it is called with, in parentheses and with a comma between.

    Raises:
        InvalidArguments: It cannot.
    """
    if not callable(function):
        raise InvalidArguments(f"{what} is {repr_of(function)}: give a function of {form}")
    if not (is_async(function) or is_plain(function)):
        raise InvalidArguments(f"{what} is {repr_of(function)}, a generator: give an async or a plain function")
    try:
        signature = inspect.signature(described(function))
    except (ValueError, TypeError, RecursionError):
        return
    count = form.partition(")")[0].count(",") + 1
    try:
        signature.bind(*(None,) * count)
    except TypeError:
        raise InvalidArguments(f"{what} is {repr_of(function)}{signature}: it is called as {form}") from None


class Shown:
    """A list for hooks to look at: copied at the first look, and compared afterwards.

    Args:
        make: Makes the list, whose parts are somebody else's.
    """

    __slots__ = ("_make", "_seen")

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make = make
        self._seen: list[Any] | None = None

    def look(self) -> list[Any]:
        """The copy."""
        if self._seen is None:
            seen: list[Any] = copied(self._make())
            self._seen = seen
        return self._seen

    @property
    def is_touched(self) -> bool:
        """Whether the copy has been changed."""
        return self._seen is not None and not is_untouched(self._seen, self._make())


class PendingRequest:
    """A request to the model that has not been sent yet, in the words of an agent's settings.

    Hooks around requests are shown one. A changed one, made by `replace`, holds for this one request: the transcript
    and the agent stay as they are. How the answer of a run with an `output_type` is asked for is added afterwards.

    Args:
        model: Name of the model at the endpoint.
        messages: The conversation that is sent, without the system prompt.
        system: The system prompt, or None.
        tools: The tools on offer: chat-completions schemas, `{"type": "function", "function": {…}}`. What is left out
            cannot be called. None are on offer when only the time for a last answer is left.
        temperature: Sampling temperature. None: the endpoint's default.
        max_tokens: Tokens the reply may have. None: the endpoint's default.
        reasoning_effort: How long a reasoning model thinks. None: the endpoint's default.
        extra_body: Further fields.

    Attributes:
        model: As above; so are the others.
    """

    __slots__ = (
        "_messages",
        "_tools",
        "extra_body",
        "max_tokens",
        "model",
        "reasoning_effort",
        "system",
        "temperature",
    )

    def __init__(
        self,
        *,
        model: str,
        messages: Sequence[Message] | Shown,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | Shown = (),
        temperature: float | None = None,
        max_tokens: int | None = None,
        reasoning_effort: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.system = model, system
        self._messages, self._tools = messages, tools
        self.temperature, self.max_tokens = temperature, max_tokens
        self.reasoning_effort = reasoning_effort
        self.extra_body: Mapping[str, Any] = {} if extra_body is None else extra_body

    @property
    def messages(self) -> list[Message]:
        """The conversation that is sent, without the system prompt: a copy; what is done to it is sent."""
        return self._messages.look() if isinstance(self._messages, Shown) else cast("list[Message]", self._messages)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools on offer: a copy; what is done to it holds for this request."""
        return self._tools.look() if isinstance(self._tools, Shown) else cast("list[dict[str, Any]]", self._tools)

    def replace(self, **changes: Any) -> PendingRequest:
        """Make a request like this one, with other values.

        Args:
            **changes: What is different, by the names of the attributes.

        Returns:
            The new request.

        Raises:
            InvalidArguments: There is no such attribute.

        Example:
            >>> request = PendingRequest(model="large", messages=[{"role": "user", "content": "hi"}])
            >>> request.replace(model="small", temperature=0).model
            'small'
        """
        held = {name.removeprefix("_"): getattr(self, name) for name in self.__slots__}
        if unknown := sorted(changes.keys() - held.keys()):
            raise InvalidArguments(f"a request has no {', '.join(unknown)}, only {', '.join(sorted(held))}")
        return PendingRequest(**{**held, **changes})

    def __repr__(self) -> str:
        return f"<PendingRequest to {self.model!r} with {len(self.messages)} messages and {len(self.tools)} tools>"


def is_changed(request: PendingRequest, name: str, original: PendingRequest) -> bool:
    """Whether an attribute of a request differs from that of the request first shown."""
    if name not in ("messages", "tools"):
        return getattr(request, name) is not getattr(original, name)
    held, first = getattr(request, f"_{name}"), getattr(original, f"_{name}")
    return held is not first or (isinstance(held, Shown) and held.is_touched)
