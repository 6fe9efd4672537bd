"""Names of OpenTelemetry's semantic conventions for generative AI, v0.1.0, and what has none there.

They are constants of our own: the package that has them marks all of them as moved, and to depend on it would tie the
names to its version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["error_of_call", "error_of_run", "usage_of_reply"]

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
AGENT_NAME = "gen_ai.agent.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_STREAM = "gen_ai.request.stream"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_write.input_tokens"
REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
TOOL_NAME = "gen_ai.tool.name"
TOOL_TYPE = "gen_ai.tool.type"
TOOL_CALL_ID = "gen_ai.tool.call.id"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
INSTRUCTIONS = "gen_ai.system_instructions"
ERROR_TYPE = "error.type"

# What the conventions have no name for.
RUN_ID = "fractal.run_id"
STOP_REASON = "fractal.stop_reason"
OUTCOME = "fractal.outcome"
ATTEMPTS = "fractal.attempts"
COST = "fractal.cost"
GROUP = "fractal.parallel_group_id"
UNFINISHED = "fractal.unfinished"
NO_BEGINNING = "fractal.no_beginning"

AGENT, CHAT, TOOL = "invoke_agent", "chat", "execute_tool"
"""The operations; their spans are called by them and by what they are about."""

ANY_PROVIDER = "openai"
"""What `gen_ai.provider.name` is where nobody says it: of all endpoints that speak OpenAI's language."""

TIMEOUT, CANCELLED, OTHER = "timeout", "cancelled", "_OTHER"
"""Values of `error.type`; others are names of classes, outcomes, or types of errors."""

OLDER_PROVIDER = "gen_ai.system"
OLDER = {CACHE_WRITE_TOKENS: "gen_ai.usage.cache_creation.input_tokens"}
"""Names until v1.41, where they are others."""

_TOKENS = {
    "input_tokens": INPUT_TOKENS,
    "output_tokens": OUTPUT_TOKENS,
    "cached_input_tokens": CACHE_READ_TOKENS,
    "cache_write_input_tokens": CACHE_WRITE_TOKENS,
    "reasoning_tokens": REASONING_TOKENS,
}

TOKENS = tuple(_TOKENS)
"""What counts of tokens are called here."""


def usage_of_reply(counts: Mapping[str, Any]) -> dict[str, int]:
    """Attributes for the tokens of a reply that are known."""
    return {name: counts[ours] for ours, name in _TOKENS.items() if type(counts.get(ours)) is int and counts[ours] > 0}


def error_of_run(success: bool, stop_reason: str | None, error_type: str | None, kind: str | None) -> str | None:
    """The `error.type` of a run; None if it went well.

    Args:
        success: Whether it gave an answer.
        stop_reason: Why it ended.
        error_type: The type of its error, as in the metadata of its result.
        kind: Name of the class of its error, if that is known.
    """
    if success:
        return None
    if stop_reason == "cancelled":
        return CANCELLED
    if stop_reason == "deadline" or error_type == "timeout":
        return TIMEOUT
    return kind or error_type or stop_reason or OTHER


def error_of_call(outcome: str, kind: str | None = None) -> str | None:
    """The `error.type` of a tool call; None if it went well.

    Args:
        outcome: How it ended.
        kind: Name of the class of its error, if that is known.
    """
    if outcome == "ok":
        return None
    return (kind or OTHER) if outcome == "error" else outcome
