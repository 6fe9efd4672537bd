"""System prompts: text, text with placeholders, or a function that makes the text of each run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from fractal._concurrency.grace import answered
from fractal._concurrency.stall import timed, watched
from fractal._engine.hooks import Warn
from fractal._functions.callables import is_async
from fractal._texts import name_of, repr_of
from fractal.context import RunContext
from fractal.errors import InvalidArguments

__all__ = ["Prompt", "SystemPrompt"]

SystemPrompt = str | Callable[..., str | Awaitable[str]]
"""Text, or a function that makes it: plain or async, with no parameter or with the run's `RunContext`."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The system prompt of an agent, in the form that the agent was given.

    Attributes:
        source: Text, or the function that makes it.
        values: What stands for the placeholders of a text.
        agent_name: Whose it is, for errors.
    """

    source: SystemPrompt
    values: dict[str, object]
    agent_name: str

    def now(self) -> Prompt:
        """The prompt with its values of this moment."""
        is_template = isinstance(self.source, str) and "{" in self.source
        return replace(self, values=dict(self.values)) if is_template else self

    def shown(self) -> SystemPrompt:
        """The text, placeholders filled; a function that is async or needs a run as it is."""
        if isinstance(self.source, str):
            return self._filled(self.source)
        if is_async(self.source) or _takes_context(self.source):
            return self.source
        return self._checked(self.source())

    async def __call__(self, context: RunContext[Any], warn: Warn) -> str:
        """Make the text for a run.

        Args:
            context: The run's.
            warn: Told of a function that holds up the event loop.

        Raises:
            InvalidArguments: The function returned no text.
        """
        source = self.source
        if isinstance(source, str):
            return self._filled(source)
        name = name_of(source)
        with watched(name, warn):
            prompt = source(context) if _takes_context(source) else source()
        prompt = await answered(timed(prompt, name, warn), name) if inspect.isawaitable(prompt) else prompt
        return self._checked(prompt)

    def _filled(self, text: str) -> str:
        if "{" not in text:
            return text
        values = self.values
        return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), text)

    def _checked(self, prompt: object) -> str:
        if not isinstance(prompt, str):
            raise InvalidArguments(
                f"the system_prompt function of {self.agent_name!r} returned {repr_of(prompt)}, not text"
            )
        return prompt


def _takes_context(function: Callable[..., Any]) -> bool:
    """Whether a prompt function has a parameter for the context: its first, if nothing else gives it a value."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return (
        first is not None and first.kind not in (first.KEYWORD_ONLY, first.VAR_KEYWORD) and first.default is first.empty
    )
