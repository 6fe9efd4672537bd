"""The tokens that an answer tells of, wherever and under whatever usual name an endpoint puts them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fractal._json import is_list, is_mapping

__all__ = ["UsageReader"]

_MOST = 2**63
_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")


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
        for usage in _usages_in(answer):
            self.input_tokens = _first_count(usage, _INPUT) or self.input_tokens
            self.output_tokens = _first_count(usage, _OUTPUT) or self.output_tokens


def _usages_in(answer: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    own, groq, choices = answer.get("usage"), answer.get("x_groq"), answer.get("choices")
    places = [groq.get("usage")] if is_mapping(groq) else []
    if is_list(choices):
        places += [choice.get("usage") for choice in choices if is_mapping(choice)]
    return [usage for usage in (*places, own) if is_mapping(usage)]


def _first_count(usage: Mapping[str, Any], names: Iterable[str]) -> int:
    return next((count for name in names if (count := _count(usage.get(name)))), 0)


def _count(value: object) -> int:
    """A number of tokens; 0 for what can be none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST:
        return 0
    return int(value)
