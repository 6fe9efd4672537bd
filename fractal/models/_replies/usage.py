"""What an answer tells beside its message: the tokens it took, which model wrote it, and its id.

Endpoints put the tokens in several places and under several names. Two ways to count are made one here: Anthropic's
names leave what a cache served out of the prompt's tokens, and xAI leaves the reasoning out of the completion's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fractal._json import is_list, is_mapping
from fractal._texts import clean_text

__all__ = ["AnswerFacts"]

_MOST = 2**63

_PLAIN = frozenset(("prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens"))

# Where a kind of tokens may be told: the object inside the usage, or None for the usage itself, and the name there.
_CACHED = (
    ("prompt_tokens_details", "cached_tokens"),
    ("input_tokens_details", "cached_tokens"),
    (None, "cache_read_input_tokens"),
    (None, "prompt_cache_hit_tokens"),
    (None, "cached_tokens"),
)
_WRITTEN = (
    ("prompt_tokens_details", "cache_write_tokens"),
    ("prompt_tokens_details", "cache_creation_tokens"),
    ("input_tokens_details", "cache_write_tokens"),
    (None, "cache_creation_input_tokens"),
    (None, "cache_write_input_tokens"),
)
_REASONING = (
    ("completion_tokens_details", "reasoning_tokens"),
    ("output_tokens_details", "reasoning_tokens"),
    (None, "reasoning_tokens"),
)


class AnswerFacts:
    """The facts of one answer besides its message, which may come in several members and pieces."""

    __slots__ = ("_adds_cache", "_cached", "_input", "_output", "_reasoning", "_total", "_written", "id", "model")

    def __init__(self) -> None:
        self.model: str | None = None
        self.id: str | None = None
        self._input = self._output = self._cached = self._written = self._reasoning = self._total = 0
        self._adds_cache = False  # the endpoint counts what a cache served, or took, beside the prompt's tokens

    def read_origin(self, answer: Mapping[str, Any]) -> None:
        """Take the model and the id that a completion, or a chunk at the start of one, names."""
        model, name = answer.get("model"), answer.get("id")
        self.model = clean_text(model)[:200] if isinstance(model, str) and model else self.model
        self.id = clean_text(name)[:200] if isinstance(name, str) and name else self.id

    def read_usage(self, answer: Mapping[str, Any]) -> None:
        """Take the token counts of a completion or chunk; later ones replace earlier ones."""
        usage = answer.get("usage")
        if not usage or not is_mapping(usage):  # some endpoints send an empty one with every chunk
            usage = _usage_elsewhere(answer)
            if usage is None:
                return
        input_tokens = _count(usage.get("prompt_tokens"))
        if not input_tokens and (input_tokens := _count(usage.get("input_tokens"))):
            self._adds_cache = "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
        self._input = input_tokens or self._input
        self._output = _count(usage.get("completion_tokens")) or _count(usage.get("output_tokens")) or self._output
        if not usage.keys() <= _PLAIN:  # most tell no more than these
            self._cached = _found(usage, _CACHED) or self._cached
            self._written = _found(usage, _WRITTEN) or self._written
            self._reasoning = _found(usage, _REASONING) or self._reasoning
        self._total = _count(usage.get("total_tokens")) or self._total

    def tokens(self) -> dict[str, int]:
        """The token counts, as the fields of a `Reply`; 0 for those that are missing."""
        counts = {"input_tokens": self._input, "output_tokens": self._output}
        if self._adds_cache:
            counts["input_tokens"] += self._cached + self._written
        if self._reasoning and self._total == self._input + self._output + self._reasoning:
            counts["output_tokens"] += self._reasoning
        if self._cached or self._written or self._reasoning:
            # A part is never more than the whole, whatever an endpoint says.
            cached = min(self._cached, counts["input_tokens"])
            counts |= {
                "cached_input_tokens": cached,
                "cache_write_input_tokens": min(self._written, counts["input_tokens"] - cached),
                "reasoning_tokens": min(self._reasoning, counts["output_tokens"]),
            }
        return counts


def _usage_elsewhere(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The usage in Groq's member, or beside a choice, as Moonshot has it."""
    groq, choices = answer.get("x_groq"), answer.get("choices")
    holders: list[Any] = [groq] if is_mapping(groq) else []
    holders += choices if is_list(choices) else []
    usages = [holder.get("usage") for holder in holders if is_mapping(holder)]
    return next((usage for usage in usages if usage and is_mapping(usage)), None)


def _found(usage: Mapping[str, Any], paths: tuple[tuple[str | None, str], ...]) -> int:
    """A number of tokens, at the first of some paths that has one."""
    for inner, name in paths:
        holder: Any = usage if inner is None else usage.get(inner)
        if holder and is_mapping(holder) and (count := _count(holder.get(name))):
            return count
    return 0


def _count(value: object) -> int:
    """A number of tokens; 0 for a value that cannot be one."""
    if type(value) is int:
        return value if 0 <= value <= _MOST else 0
    return int(value) if isinstance(value, float) and 0 <= value <= _MOST else 0
