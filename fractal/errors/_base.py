"""The roots of all errors, wrong use, and why a run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "SUCCESSES",
    "AnswerRejected",
    "ClientBoundToLoop",
    "FractalError",
    "InvalidArguments",
    "InvalidMessages",
    "InvalidTool",
    "OtherProcess",
    "PortalClosed",
    "PriceUnknown",
    "RunError",
    "StopReason",
    "SyncInAsyncError",
    "ToolNameTaken",
    "UserError",
]


StopReason = Literal[
    "finished",
    "terminated",
    "soft_deadline",
    "refusal",
    "guard",
    "no_content",
    "invalid_output",
    "max_iterations",
    "deadline",
    "budget",
    "context_window",
    "depth",
    "model_error",
    "tool_error",
    "approval",
    "cancelled",
    "error",
]
"""Why a run ended: the model's last word (`finished`), a terminating tool (`terminated`), the answer asked for
when time ran short (`soft_deadline`), or what cut it."""

SUCCESSES: frozenset[StopReason] = frozenset({"finished", "terminated", "soft_deadline"})
"""Stop reasons of runs that gave an answer."""


def _rebuild(kind: type[FractalError], args: tuple[Any, ...]) -> FractalError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class FractalError(Exception):
    """The root: `except FractalError` catches everything this package raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., FractalError], tuple[Any, ...], dict[str, Any]]:
        return _rebuild, (type(self), self.args), dict(self.__dict__)


class UserError(FractalError):
    """The package was used in a way that cannot work; raised at once."""


class InvalidArguments(UserError, TypeError):
    """An argument of a public function has the wrong type or shape."""


class InvalidTool(UserError, TypeError):
    """A function cannot be offered to a model as it is.

    Attributes:
        tool_name: Name under which it was to be registered.
        fault: What is in the way.
    """

    def __init__(self, tool_name: str, fault: str) -> None:
        self.tool_name, self.fault = tool_name, fault
        super().__init__(f"{tool_name!r} cannot be a tool: {fault}")


class ToolNameTaken(UserError, ValueError):
    """Two tools would have one name, and the model could not tell them apart.

    Attributes:
        tool_name: The name.
    """

    def __init__(self, tool_name: str) -> None:
        self.tool_name = tool_name
        super().__init__(
            f"there is a tool called {tool_name!r} already: give this one another name=, or replace=True to take its"
            " place"
        )


class InvalidMessages(UserError, ValueError):
    """A message history that an endpoint would refuse.

    Attributes:
        index: Position of the faulty message in the list.
        fault: What is wrong with it.
    """

    def __init__(self, index: int, fault: str) -> None:
        self.index, self.fault = index, fault
        super().__init__(f"messages[{index}]: {fault}")


class PriceUnknown(UserError, LookupError):
    """A budget in money was given, and a model has no price, so that nobody can hold it.

    Attributes:
        model: Name of the model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(
            f"max_cost needs the price of the model {model!r}: give prices={{{model!r}: Price(…)}}, or install the"
            " extra 'cost', which knows the prices of many"
        )


class ClientBoundToLoop(UserError, RuntimeError):
    """A client with an HTTP client of its own was used from a second event loop."""

    def __init__(self, client: str) -> None:
        self.client = client
        super().__init__(
            f"this {client} was made with its own http_client, whose connections belong to the event loop that used"
            " it first. Make one agent (or one client) per loop, or leave http_client= out: then every loop gets"
            " its own connections by itself"
        )


class SyncInAsyncError(UserError, RuntimeError):
    """A blocking call was made on the very event loop that would have to answer it."""


class PortalClosed(UserError, RuntimeError):
    """A blocking call was made on an event loop of which the block, `with sync.portal()`, has been left.

    Attributes:
        backend: What the event loop ran on.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        super().__init__(
            f"the block of this {backend} portal has been left, and its event loop has ended: make the call inside the"
            " block, or outside of a context that was copied in it"
        )


class OtherProcess(UserError, RuntimeError):
    """A forked child waits for what runs in its parent.

    Attributes:
        pid: Id of the process in which it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        super().__init__(
            f"this runs in process {pid}, from which this one was forked: wait for it there, or make the call again in"
            " this one"
        )


class AnswerRejected(FractalError):
    """An output validator does not accept the model's answer: the model is told why, and asked again.

    Args:
        reason: What is wrong with the answer, in words for the model.

    Attributes:
        reason: The same.

    Example:
        >>> def no_empty_lists(output: list[str]) -> None:
        ...     if not output:
        ...         raise AnswerRejected("give at least one")
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class RunError(FractalError):
    """The reason why a run did not succeed.

    Attributes:
        result: The run's `AgentResult` with all it had done so far, once there is one.
    """

    stop_reason: ClassVar[StopReason] = "error"
    error_type: ClassVar[str] = "unexpected_error"
    result: Any = None
