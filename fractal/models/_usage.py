"""The tokens that an answer tells of, wherever and under whatever usual name an endpoint puts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping

__all__ = ["UsageReader"]

_MOST = 2**63


class UsageReader:
    """Gathers the tokens of one answer, which may be told in several places and pieces.

    Attributes:
        input_tokens: Prompt tokens, 0 until they are told.
        output_tokens: Completion tokens, 0 until they are told.
    """

    __slots__ = ("input_tokens", "output_tokens")

    def __init__(self) -> None:
        self.input_tokens = self.output_tokens = 0

    def read(self, answer: Mapping[str, Any]) -> None:
        """Take what a completion, or a chunk of one, says; what is told later counts more than what was told before."""
        usage = answer.get("usage")
        if not usage or not is_mapping(usage):  # some endpoints send an empty one with every chunk
            usage = _usage_elsewhere(answer)
            if usage is None:
                return
        input_tokens = _count(usage.get("prompt_tokens")) or _count(usage.get("input_tokens"))
        output_tokens = _count(usage.get("completion_tokens")) or _count(usage.get("output_tokens"))
        self.input_tokens = input_tokens or self.input_tokens
        self.output_tokens = output_tokens or self.output_tokens


def _usage_elsewhere(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The usage where Groq puts it, or beside a choice, as Moonshot does."""
    groq, choices = answer.get("x_groq"), answer.get("choices")
    places: list[Any] = [groq] if is_mapping(groq) else []
    places += choices if is_list(choices) else []
    usages = [place.get("usage") for place in places if is_mapping(place)]
    return next((usage for usage in usages if usage and is_mapping(usage)), None)


def _count(value: object) -> int:
    """A number of tokens; 0 for what can be none."""
    if type(value) is int:
        return value if 0 <= value <= _MOST else 0
    return int(value) if isinstance(value, float) and 0 <= value <= _MOST else 0
