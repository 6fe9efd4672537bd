"""What comes back: of a run, and of a tool call."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import TypeVar

from fractal._forms import AnyMessage, AnyObject, AsJson, Count, PortableModel, Text, portable_error, shown
from fractal._json import is_list
from fractal._stored import complete_call, complete_run, without_nulls
from fractal._texts import clean_text, str_of
from fractal.approval import PendingCall
from fractal.errors import RunError, StopReason

__all__ = ["AgentResult", "AgentReturnPart", "Outcome", "ToolResult", "ToolReturnPart", "Usage"]

Outcome = Literal["ok", "error", "timeout", "cancelled", "abandoned", "skipped", "denied"]
"""How a tool call ended; every call has exactly one.

`ok`: it returned. `error`: it raised, or its arguments did not fit. `timeout`: its time, or that of a run above it,
was over. `cancelled`: someone cancelled the run. `abandoned`: as the two before, but it could not be stopped and goes
on, in a worker thread or, with `Limits(on_stubborn="raise")`, in a task. `skipped`: it was never started. `denied`: it
required approval and got none.
"""


Content = TypeVar("Content")
"""What the answer of one run has to be."""

Content_co = TypeVar("Content_co", covariant=True, default=Any)
"""What answers have to be, where a type checker can know it: the `output_type`."""

_NONE: Any = None

_LONGEST_TRANSCRIPT = 1000


class Usage(PortableModel):
    """The usage of a run, with every run it delegated to.

    Example:
        >>> (Usage(input_tokens=3, output_tokens=4) + Usage(output_tokens=1)).total_tokens
        8
    """

    model_config = ConfigDict(frozen=True)

    requests: Count = Field(default=0, description="Requests sent to the endpoint, retries included.")
    tool_calls: Count = Field(default=0, description="Tool calls that the limits allowed.")
    input_tokens: Count = Field(default=0, description="Prompt tokens, as the endpoint reported them.")
    output_tokens: Count = Field(default=0, description="Completion tokens, as the endpoint reported them.")
    cached_input_tokens: Count = Field(default=0, description="Those of the prompt tokens that its cache served.")
    cache_write_input_tokens: Count = Field(default=0, description="Those of the prompt tokens it put into its cache.")
    reasoning_tokens: Count = Field(default=0, description="Those of the completion tokens the model thought with.")
    cost: float | None = Field(
        default=0.0,
        description="What the replies cost, in the currency of the prices; None if that is not known of each.",
    )

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        """The usage of both together."""
        counts = {
            name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields if name != "cost"
        }
        cost = self.cost + other.cost if self.cost is not None and other.cost is not None else None
        return Usage(**counts, cost=cost)


class _Made(PortableModel):
    """Base of the results that the engine makes often, of values that are known to fit."""

    @model_validator(mode="before")
    @classmethod
    def _read_nulls(cls, given: Any) -> Any:
        return without_nulls(given)

    @classmethod
    def of_facts(cls, exception: BaseException | None, /, **facts: Any) -> Self:
        """Make a result of all its fields, in their order, unchecked: validation would copy a transcript."""
        return _made(cls, facts, {"_exception": exception})

    def changed(self, **facts: Any) -> Self:
        """A copy with other values of some fields; made sooner than by `model_copy`."""
        return _made(type(self), {**vars(self), **facts}, {**(self.__pydantic_private__ or {})})

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; the exception behind them, which no copy has, does not count."""
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the result so that references to it lead to the copy; pydantic before 2.14.2 does not do so."""
        memo = {} if memo is None else memo
        made = memo[id(self)] = type(self).__new__(type(self))
        error = (self.__pydantic_private__ or {}).get("_exception")
        if error is not None and portable_error(error) is None:
            memo[id(error)] = error  # of a class that cannot be made again: the copy has the same one
        made.__setstate__(deepcopy(BaseModel.__getstate__(self), memo))
        return made


_Result = TypeVar("_Result", bound=_Made)


def _made(kind: type[_Result], facts: dict[str, Any], private: dict[str, Any]) -> _Result:
    made = kind.__new__(kind)
    set_attribute = object.__setattr__  # what `model_construct` does too, once it has asked each field for defaults
    set_attribute(made, "__dict__", facts)
    set_attribute(made, "__pydantic_fields_set__", _names_of(kind))
    set_attribute(made, "__pydantic_extra__", None)
    set_attribute(made, "__pydantic_private__", private)
    return made


@functools.cache
def _names_of(kind: type[BaseModel]) -> set[str]:
    """The names of all fields: one set for all results that have them all, of which there may be many."""
    return set(kind.model_fields)


class ToolResult(_Made):
    """The result of one tool call.

    Example:
        >>> ToolResult(content=[1, 2], tool_name="numbers").outcome
        'ok'
    """

    content: AnyObject = Field(default=None, description="What the tool returned, as the Python object it is.")
    tool_name: Text = Field(description="Name of the tool as the model called it.")
    metadata: dict[Text, AnyObject] = Field(
        default_factory=dict, description="`arguments` as the tool got them, and `terminate`."
    )
    error: Text | None = Field(default=None, description="What the model was told went wrong; None if all went well.")
    outcome: Outcome = Field(default="ok", description="How the call ended.")
    elapsed: float = Field(
        default=0.0,
        description="Seconds from the start of the call to its end, waiting for approval left out.",
    )
    call_id: Text | None = Field(default=None, description="Id of the call, as in the transcript and the events.")

    _exception: BaseException | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _complete(self) -> ToolResult:
        complete_call(self)
        return self

    def _repr_html_(self) -> str:
        from fractal._html import of_tool_result

        return of_tool_result(self)

    @property
    def exception(self) -> BaseException | None:
        """The exception behind `error`; None if there is none.

        None too after a trip through JSON, or through a pickle that cannot take the exception.
        """
        return self._exception


class AgentResult(_Made, Generic[Content_co]):
    """The result of a run, with all it did; one class for every way a run can end.

    For type checkers `AgentResult[Order]` has an `Order` as its content: what a run with that `output_type` gives, if
    it succeeds and no tool with `terminate=True` ends it. For Python and pydantic it is `AgentResult` itself.

    Example:
        >>> AgentResult(content="hi", agent_name="Greeter").success
        True
    """

    content: Annotated[Content_co, AsJson] = Field(
        default=_NONE,
        description="The answer: text, or what a terminating tool returned. After a failure the reason as text.",
    )
    agent_name: Text = Field(description="Name of the agent that ran.")
    success: bool = Field(default=True, description="Whether there is an answer.")
    metadata: dict[Text, AnyObject] = Field(
        default_factory=dict,
        description="`iterations`, `messages`, `model` and `terminated_by_tool`, the name of a tool or None; after a"
        " failure also `reason`, `error` and `error_type`.",
    )
    stop_reason: StopReason = Field(default="finished", description="Why the run ended.")
    error: Text | None = Field(default=None, description="What went wrong, for a human; None after a success.")
    messages: list[AnyMessage] = Field(
        default_factory=list[dict[str, Any]],
        description="The transcript, without the system prompt. Pass it as `messages=` to go on.",
    )
    usage: Usage = Field(default_factory=Usage, description="What was used, delegates included.")
    run_id: Text = Field(default="", description="Id of the run, as in its events.")
    tool_results: list[ToolResult] = Field(
        default_factory=list[ToolResult], description="Every tool call of the run itself, in call order."
    )
    abandoned: list[ToolResult] = Field(
        default_factory=list[ToolResult],
        description="Calls, delegates' included, whose worker thread was still running when the run ended.",
    )
    pending: Annotated[list[PendingCall], AsJson] = Field(
        default_factory=list[PendingCall],
        description="Tool calls that wait for an answer, with the stop reason `approval`: see `agent.resume`.",
    )
    warnings: list[Text] = Field(default_factory=list[str], description="What was odd, but stopped nothing.")
    elapsed: float = Field(default=0.0, description="Seconds the run took.")

    _exception: RunError | None = PrivateAttr(default=None)

    if not TYPE_CHECKING:

        def __class_getitem__(cls, _content: Any) -> type[Self]:
            """The class itself: pydantic would make another one, of which no result is an instance."""
            return cls

    @model_validator(mode="after")
    def _share_messages(self) -> Self:
        if "messages" in self.metadata:
            if not self.messages and is_list(self.metadata["messages"]):
                self.messages = self.metadata["messages"]
            self.metadata["messages"] = self.messages
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        complete_run(self)
        return self

    @property
    def exception(self) -> RunError | None:
        """The error behind `error`; None after a success.

        A plain `RunError` with the same text and stop reason after a trip through JSON, or through a pickle that cannot
        take the error.
        """
        if self._exception is None and not self.success:
            self._exception = RunError(self.error or self.stop_reason)
            error_type = self.metadata.get("error_type", RunError.error_type)
            vars(self._exception).update(stop_reason=self.stop_reason, error_type=error_type)
            self._exception.result = self
        return self._exception

    def raise_for_error(self) -> Self:
        """Raise the error of a failed run; do nothing after a success.

        Returns:
            The result itself, so that `(await agent.run("…")).raise_for_error().content` reads well.

        Raises:
            RunError: The run did not succeed; the error's `result` is this result.
        """
        if self.exception is not None:
            raise self.exception
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The fields for `repr()`, with the transcript once, cut to a length."""
        for name, value in super().__repr_args__():
            if name == "metadata":
                yield name, {key: each for key, each in self.metadata.items() if key != "messages"}
            else:
                yield name, _Cut(value) if name == "messages" else value

    def _repr_html_(self) -> str:
        from fractal._html import of_result

        return of_result(self)

    def __str__(self) -> str:
        text = f": {str_of(self.content)}" if self.success else f" failed: {self.error}"
        return clean_text(self.agent_name + text)


class _Cut:
    """A value whose `repr()` is cut to a length."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        text = shown(self._value)
        return text if len(text) <= _LONGEST_TRANSCRIPT else f"{text[:_LONGEST_TRANSCRIPT]}…"


AgentReturnPart = AgentResult
ToolReturnPart = ToolResult
