"""Metrics of agents, models and tools, by OpenTelemetry's semantic conventions for generative AI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import fractal.tracing.names as names

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram, Meter

__all__ = ["Attributes", "Meters"]

Attributes = Mapping[str, str | int | float | bool]

_SECONDS = [0.01 * 2**n for n in range(14)]
_SECONDS_OF_AGENTS = [0.1 * 2**n for n in range(13)]
_CALLS = [2**n for n in range(8)]
_TOKENS = [4**n for n in range(14)]
"""Boundaries of buckets, as the conventions give them."""

_MODALITY = "gen_ai.token.modality"
_TOKEN_TYPE = "gen_ai.token.type"


class Meters:
    """The instruments of one meter.

    Args:
        meter: Whose they are.
        older: Whether those of a model have the names of v1.41 of the conventions.
    """

    def __init__(self, meter: Meter, *, older: bool) -> None:
        of_models = "gen_ai.client.operation" if older else "gen_ai.client.inference"
        self._inference = _histogram(meter, f"{of_models}.duration", "s", "Duration of a request.", _SECONDS)
        self._first_chunk = _histogram(
            meter, f"{of_models}.time_to_first_chunk", "s", "Time until the first piece of a reply.", _SECONDS
        )
        self._agent = _histogram(
            meter, "gen_ai.invoke_agent.duration", "s", "Duration of a run of an agent.", _SECONDS_OF_AGENTS
        )
        self._inference_calls = _histogram(
            meter, "gen_ai.invoke_agent.inference_calls", "{inference_call}", "Requests to the model in a run.", _CALLS
        )
        self._tool_calls = _histogram(
            meter, "gen_ai.invoke_agent.tool_calls", "{tool_call}", "Tool calls in a run.", _CALLS
        )
        self._tool = _histogram(meter, "gen_ai.execute_tool.duration", "s", "Duration of a tool call.", _SECONDS)
        self._tokens: _Tokens = _TokensInOne(meter) if older else _TokensApart(meter)

    def request_ended(self, seconds: float, about: Attributes, error: str | None) -> None:
        """Record a request with all its retries."""
        self._inference.record(seconds, _with_error(about, error))

    def reply_came(self, usage: Mapping[str, int], first_chunk: float | None, about: Attributes) -> None:
        """Record what a reply used.

        Args:
            usage: Tokens by the names of attributes.
            first_chunk: Seconds until its first piece; None if it was not streamed.
            about: Whose reply it is.
        """
        if first_chunk is not None:
            self._first_chunk.record(first_chunk, about)
        self._tokens.add(usage, about)

    def tool_ended(self, seconds: float, about: Attributes, error: str | None) -> None:
        """Record a tool call."""
        self._tool.record(seconds, _with_error(about, error))

    def run_ended(
        self, seconds: float, about: Attributes, error: str | None, *, requests: int, tool_calls: int
    ) -> None:
        """Record a run, and how many requests and tool calls it made itself."""
        self._agent.record(seconds, _with_error(about, error))
        self._inference_calls.record(requests, about)
        self._tool_calls.record(tool_calls, about)


class _TokensApart:
    """A counter for each kind of token."""

    def __init__(self, meter: Meter) -> None:
        kinds = {
            names.INPUT_TOKENS: "Tokens of prompts.",
            names.OUTPUT_TOKENS: "Tokens of replies.",
            names.CACHE_READ_TOKENS: "Tokens of prompts that a cache served.",
            names.CACHE_WRITE_TOKENS: "Tokens of prompts that were put into a cache.",
            names.REASONING_TOKENS: "Tokens of replies that a model thought with.",
        }
        self._counters: dict[str, Counter] = {
            name: meter.create_counter(
                name.replace("gen_ai.usage", "gen_ai.client.inference.usage"), unit="{token}", description=kind
            )
            for name, kind in kinds.items()
        }

    def add(self, usage: Mapping[str, int], about: Attributes) -> None:
        # Endpoints tell how many tokens there were, and of no kind of content how many.
        of_any_kind = {**about, _MODALITY: "unknown"}
        for name, count in usage.items():
            self._counters[name].add(count, of_any_kind)


class _TokensInOne:
    """The one histogram of v1.41, which knows prompts and replies."""

    def __init__(self, meter: Meter) -> None:
        self._histogram = _histogram(
            meter, "gen_ai.client.token.usage", "{token}", "Tokens of prompts and replies.", _TOKENS
        )

    def add(self, usage: Mapping[str, int], about: Attributes) -> None:
        for name, kind in ((names.INPUT_TOKENS, "input"), (names.OUTPUT_TOKENS, "output")):
            if name in usage:
                self._histogram.record(usage[name], {**about, _TOKEN_TYPE: kind})


_Tokens = _TokensApart | _TokensInOne


def _histogram(meter: Meter, name: str, unit: str, description: str, buckets: list[float] | list[int]) -> Histogram:
    return meter.create_histogram(
        name, unit=unit, description=description, explicit_bucket_boundaries_advisory=[*buckets]
    )


def _with_error(about: Attributes, error: str | None) -> Attributes:
    return about if error is None else {**about, names.ERROR_TYPE: error}
