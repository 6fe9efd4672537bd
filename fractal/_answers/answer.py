"""What a run takes for an answer: in which way it is asked for, how it is read, who has a say in it, and how often."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from fractal._answers.output import WRAPPER, OutputFault, OutputType, free_tool_name
from fractal._answers.ways import OutputMemory, OutputMode, OutputPlan
from fractal._functions.schema import ArgumentsFault, Parameters
from fractal._json import decode, encode, is_mapping
from fractal.errors import InvalidOutput, StatusError
from fractal.model import ToolSchemas
from fractal.toolkit import Tool, ToolOptions

__all__ = ["Answer", "AnswerSettings", "Offer"]

Validator = Callable[[Any, Any, Callable[[str], object]], Awaitable[Any]]
"""Takes an answer, the run's context, and who is told of what is odd; gives another answer, or None."""


class Offer(NamedTuple):
    """The tools that a request offers, and their schemas."""

    tools: Mapping[str, Tool]
    schemas: ToolSchemas


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """The settings of an agent, or of one run, for the answer.

    Attributes:
        type: What answers are; None for text.
        mode: The way to ask for them.
        validators: Who has a say in each, in this order.
        memory: What the endpoint is known to refuse.
    """

    type: OutputType | None
    mode: OutputMode
    validators: tuple[Validator, ...]
    memory: OutputMemory


class Answer:
    """The answer of one run: how it is asked for, read, and checked.

    Args:
        settings: What it shall be.
        own: What the run offers of its own.
        model_name: Name of the model at the endpoint.
        max_retries: Times that the model may answer again.
        context: Makes the context that validators get.
        warn: Told of what is odd.

    Attributes:
        offer: What the run offers, with the tool that takes the answer if that is the way.
        type: What it shall be a value of; None for text.
        tool_name: The tool that takes it, when it is asked for in that way.
    """

    def __init__(
        self,
        settings: AnswerSettings,
        own: Offer,
        *,
        model_name: str,
        max_retries: int,
        context: Callable[[], Any],
        warn: Callable[[str], object],
    ) -> None:
        self._settings, self._own, self.offer = settings, own, own
        self._max_retries, self._context, self._warn = max_retries, context, warn
        self.type = settings.type
        self._plan = OutputPlan(settings.mode, model_name, settings.memory) if settings.type else None
        self.tool_name = free_tool_name(own.tools)
        self._rejected = 0
        self._is_forced = False  # the next reply has to call the tool
        self._can_be_forced = True
        self._offer()

    def fields(self) -> dict[str, Any]:
        """Further fields of each request."""
        if self.type is None or self._plan is None:
            return {}
        if self._is_forced:
            return {"tool_choice": {"type": "function", "function": {"name": self.tool_name}}}
        return self.type.request_fields(self._plan.way)

    def system(self, prompt: str | None) -> str | None:
        """The system prompt, with the instruction about the form of the answer."""
        words = self.type.instruction(self._plan.way, self.tool_name) if self.type and self._plan else None
        return "\n\n".join(filter(None, (prompt, words))) or None

    def closing_tools(self) -> ToolSchemas | None:
        """The tools of the closing request."""
        return self._schema_of_tool() if self._is_tool_way() else None

    def refused(self, error: StatusError) -> bool:
        """Whether the endpoint refuses the way that was used, and another one was chosen."""
        if self._plan is None:
            return False
        if self._is_forced and error.is_refusal and (not error.names or "tool_choice" in error.names):
            self._is_forced = self._can_be_forced = False
            return True
        if not self._plan.refused(error):
            return False
        self._offer()
        return True

    def failure(self, error: StatusError) -> StatusError:
        """The error to raise when there is no other way."""
        return self._plan.failure(error) if self._plan is not None else error

    def accepted(self) -> None:
        """Note that the endpoint has taken the way."""
        if self._plan is not None:
            self._plan.accepted()
        self._is_forced = False

    @property
    def way(self) -> str | None:
        """The way in which the answer is asked for now; None for text."""
        return self._plan.way if self._plan is not None else None

    def take_way(self, way: str | None) -> None:
        """Ask in the way that the endpoint took of an earlier process of this run."""
        if self._plan is not None and self._plan.take(way):
            self._offer()

    async def read(self, text: str) -> Any:
        """The answer in a reply's text.

        Raises:
            OutputFault: It is none.
            AnswerRejected: A validator does not want it.
        """
        return await self.approved(self.type.parse_text(text) if self.type is not None else text)

    async def approved(self, answer: Any) -> Any:
        """The answer, after all validators.

        Raises:
            AnswerRejected: A validator does not want it.
        """
        for validator in self._settings.validators:
            other = await validator(answer, self._context(), self._warn)
            answer = other if other is not None else answer
        return answer

    def reject(self, fault: str, text: str) -> str:
        """Note a rejected answer.

        Returns:
            What the model is told.

        Raises:
            InvalidOutput: It has been told often enough.
        """
        self._rejected += 1
        if self._rejected > self._max_retries:
            raise InvalidOutput(self._rejected, fault, text)
        if self.type is None or self._plan is None:
            return f"The answer was not accepted: {fault}. Give the whole answer again."
        # Some models do not find the tool by themselves, after they have called others.
        self._is_forced = self._is_tool_way() and self._can_be_forced
        return self.type.correction(fault, self._plan.way, self.tool_name)

    def _is_tool_way(self) -> bool:
        return self._plan is not None and self._plan.way == "tool"

    def _offer(self) -> None:
        self.offer = own = self._own
        if self.type is not None and self._is_tool_way():
            tools = {**own.tools, self.tool_name: self._tool(self.type)}
            self.offer = Offer(tools, own.schemas.plus(self._schema_of_tool()))

    def _schema_of_tool(self) -> ToolSchemas:
        assert self.type is not None
        return ToolSchemas([self.type.tool_schema(self.tool_name)])

    def _tool(self, kind: OutputType) -> Tool:
        options = ToolOptions(name=self.tool_name, terminate=True)
        parameters = _AnswerParameters(kind)
        return Tool(self.tool_name, "", self.approved, parameters, True, options, is_answer=True)


class _Written(dict[str, Any]):
    """Raw arguments, which events show, with the answer parsed from them."""

    answer: Any = None


class _AnswerParameters(Parameters):
    """The parameters of the tool that takes the answer: the answer's own fields, read as one value."""

    __slots__ = ("_kind",)

    def __init__(self, kind: OutputType) -> None:
        self._kind = kind
        self.json_schema = kind.json_schema
        self.context_names = set[str]()

    def check(self, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
        """The raw arguments, with the answer parsed from them."""
        text = arguments if isinstance(arguments, str) else encode(dict(arguments)).decode()
        try:
            answer = self._kind.parse_arguments(text)
        except OutputFault as fault:
            raise ArgumentsFault(str(fault)) from None
        value = decode(text.strip() or "{}")
        written = _Written(value if is_mapping(value) else {WRAPPER: value})
        written.answer = answer
        return written

    def bind(self, arguments: Mapping[str, Any], context: object) -> tuple[list[Any], dict[str, Any]]:
        """The answer as the argument of the call."""
        return [cast("_Written", arguments).answer], {}
