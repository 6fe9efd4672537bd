"""`Instrumentation`: an observer that makes OpenTelemetry spans and metrics of what runs do.

A span is begun and ended where the event is told: in the run's own task. There, and in the tasks and threads of tool
calls, it is made the current one by setting a context variable that ends with the task. So nothing has to be detached,
and nothing of it reaches a reader's task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from opentelemetry import context as contexts, metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.trace import NoOpTracer, NoOpTracerProvider, Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import fractal.tracing.names as names
from fractal._json import decode
from fractal._redact import PayloadWriter
from fractal._texts import repr_of, type_name
from fractal.errors import InvalidArguments
from fractal.events import (
    Event,
    ModelRequested,
    ModelResponded,
    RunFinished,
    RunObserver,
    RunStarted,
    ToolFinished,
    ToolStarted,
)
from fractal.tracing.content import instructions_of, message_in_parts, shown
from fractal.tracing.live import Conversation, Open, OpenChat, OpenRun
from fractal.tracing.meters import Meters

__all__ = ["Instrumentation"]


class Instrumentation(RunObserver):
    """Tells OpenTelemetry what runs do: a span for each run, request and tool call, and metrics.

    One serves any number of agents and runs. A run is below the span that is current where it is begun; inside a tool,
    the span of its call is current. Needs the extra `otel`. Runs are observed only once somebody has set up an SDK.

    Args:
        tracer_provider: Where spans go. None: the global provider, as it is when a run begins.
        meter_provider: Where metrics go. None: the global provider, as it is when a run begins.
        include_content: Whether spans have what was said: messages, instructions, arguments, results, texts of errors;
            without what looks like a secret, and with long texts cut.
        older_names: Whether to use the names of v1.41 of the conventions instead of those of v0.1.0 of the
            repository that they have moved to.
        send_traceparent: Whether requests tell the endpoint which span they belong to, by the header `traceparent`.
        provider_name: Who answers, in the words of the conventions; `"openai"` stands for all endpoints of its kind.

    Raises:
        InvalidArguments: A provider is none, or `provider_name` no text.

    Example:
        ```python
        agent = BaseAgent("Guide", "You know the way.", observers=[Instrumentation()])
        ```
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        include_content: bool = False,
        *,
        older_names: bool = False,
        send_traceparent: bool = False,
        provider_name: str = names.ANY_PROVIDER,
    ) -> None:
        _check("tracer_provider", tracer_provider, TracerProvider)
        _check("meter_provider", meter_provider, MeterProvider)
        if not isinstance(provider_name, str) or not provider_name:
            raise InvalidArguments(f"provider_name={repr_of(provider_name)}: give a name")
        # A stand-in for the global one gives way to it.
        self._tracer_provider = None if _is_stand_in(tracer_provider, NoOpTracerProvider) else tracer_provider
        self._meter_provider = None if _is_stand_in(meter_provider, NoOpMeterProvider) else meter_provider
        self._includes_content, self._sends_traceparent = include_content, send_traceparent
        self._older, self._provider_name = older_names, provider_name
        self._payload = PayloadWriter()
        self._providers: tuple[object, object] | None = None  # those that the next two are of
        for load in (trace.get_tracer_provider, metrics.get_meter_provider):
            load()  # what the environment names
        self._tracer: trace.Tracer | None = None
        self._meters: Meters | None = None
        self._runs: dict[str, OpenRun] = {}

    def __repr__(self) -> str:
        return f"<Instrumentation: {len(self._runs)} runs go on>"

    def wants_run(self) -> bool:
        """Whether anybody takes spans or metrics."""
        providers = (
            self._tracer_provider or _global(trace.get_tracer_provider, "_TRACER_PROVIDER"),
            self._meter_provider or _global(metrics.get_meter_provider, "_METER_PROVIDER"),
        )
        if providers != self._providers:
            self._use(*providers)
        return self._tracer is not None or self._meters is not None

    def _use(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        from fractal import __version__

        self._tracer = self._meters = None
        if tracer_provider is not None and not _is_silent(tracer_provider):
            tracer = tracer_provider.get_tracer("fractal", __version__)
            self._tracer = None if isinstance(tracer, NoOpTracer) else tracer  # the SDK's own, where it is disabled
        if meter_provider is not None and not _is_silent(meter_provider):
            self._meters = Meters(meter_provider.get_meter("fractal", __version__), older=self._older)
        self._providers = tracer_provider, meter_provider

    def __call__(self, event: Event) -> None:
        """Begin or end a span."""
        tell = _tells.get(type(event))
        if tell is not None:
            tell(self, event)

    def enter_call(self, run_id: str, call_id: str) -> None:
        """Make the span of a tool call the current one, for the tool."""
        run = self._runs.get(run_id)
        call = run.calls.get(call_id) if run is not None else None
        if call is not None:
            contexts.attach(call.context)

    def request_headers(self, run_id: str) -> Mapping[str, str]:
        """Say which span a request belongs to, if that is wanted."""
        headers: dict[str, str] = {}
        run = self._runs.get(run_id)
        if self._sends_traceparent and run is not None and run.chat is not None:
            _propagator.inject(headers, run.chat.part.context)
        return headers

    # ---- runs

    def _run_started(self, event: RunStarted) -> None:
        agent = self._name(event.agent_name)
        about = {names.AGENT_NAME: agent}
        facts = about | {names.RUN_ID: event.run_id}
        if self._older:
            facts[names.PROVIDER] = self._provider_name
        part = self._begin(names.AGENT, agent, self._context_above(event), event.at, facts)
        run = self._runs[event.run_id] = OpenRun(part, about)
        if self._includes_content and part.span.is_recording():
            run.conversation = Conversation(self._payload, [*event.history, event.message])
            part.span.set_attribute(names.INPUT_MESSAGES, run.conversation.last())
        contexts.attach(part.context)

    def _context_above(self, event: RunStarted) -> Context:
        above = self._runs.get(event.parent_id or "")
        around = above.calls.get(event.call_id or "", above.part).context if above is not None else None
        return self._context_here(around)

    def _run_finished(self, event: RunFinished) -> None:
        run, result = self._runs.pop(event.run_id, None), event.result
        if run is None:
            return
        error = names.error_of_run(
            result.success, result.stop_reason, result.metadata.get("error_type"), _kind_of(result.exception)
        )
        for call in run.calls.values():
            self._end(call, {}, error or names.CANCELLED)
        if run.chat is not None:
            self._end_chat(run.chat, {}, error or names.CANCELLED, result.error)
        facts: dict[str, Any] = {names.STOP_REASON: result.stop_reason, **self._usage_of_run(run)}
        if run.conversation is not None and result.success:
            answer = {"role": "assistant", "content": shown(result.content)}
            facts[names.OUTPUT_MESSAGES] = self._written([message_in_parts(answer)])
        seconds = self._end(run.part, facts, error, result.error)
        if self._meters is not None:
            self._meters.run_ended(seconds, run.about, error, requests=run.requests, tool_calls=run.tool_calls)

    def _usage_of_run(self, run: OpenRun) -> dict[str, int]:
        if self._older:
            return self._named(run.usage)
        return {name: run.usage[name] for name in (names.INPUT_TOKENS, names.OUTPUT_TOKENS) if name in run.usage}

    # ---- requests

    def _requested(self, event: ModelRequested) -> None:
        run = self._runs.get(event.run_id)
        if run is None:
            return
        run.offered = frozenset(event.tools)
        if run.conversation is not None:
            run.conversation.add(event.added)
        if run.chat is not None:
            if run.chat.iteration == event.iteration:
                run.chat.attempts += 1
                return
            self._end_chat(run.chat, {}, names.CANCELLED)  # it was given up for this one
        run.chat = self._begin_chat(run, event)
        if run.conversation is not None:
            span = run.chat.part.span
            span.set_attribute(names.INPUT_MESSAGES, run.conversation.sent(event.kept))
            span.set_attribute(names.INSTRUCTIONS, self._written(instructions_of(event.opening)))
        contexts.attach(run.chat.part.context)

    def _begin_chat(self, run: OpenRun, event: ModelRequested) -> OpenChat:
        run.requests += 1
        model = self._name(event.model)
        about = {names.OPERATION: names.CHAT, names.PROVIDER: self._provider_name}
        if model:
            about[names.REQUEST_MODEL] = model
        about |= names.of_server(event.server)
        facts = about | run.about | {names.RUN_ID: event.run_id} | names.of_parameters(event.parameters)
        if self._older:
            facts[names.OLDER_PROVIDER] = self._provider_name
        part = self._begin(names.CHAT, model, run.part.context, event.at, facts, SpanKind.CLIENT)
        return OpenChat(part, about, event.iteration)

    def _responded(self, event: ModelResponded) -> None:
        run = self._runs.get(event.run_id)
        if run is None or run.chat is None:
            return
        chat, run.chat = run.chat, None
        if event.model:
            chat.about[names.RESPONSE_MODEL] = self._name(event.model)
        usage = names.usage_of_reply({name: getattr(event, name) for name in names.TOKENS})
        run.use(usage)
        self._end_chat(chat, self._facts_of_reply(event, chat) | self._named(usage))
        if self._meters is not None:
            self._meters.reply_came(usage, event.first_piece, chat.about)
        contexts.attach(run.part.context)

    def _facts_of_reply(self, event: ModelResponded, chat: OpenChat) -> dict[str, Any]:
        facts: dict[str, Any] = {
            names.RESPONSE_MODEL: chat.about.get(names.RESPONSE_MODEL),
            names.RESPONSE_ID: self._name(event.response_id) if event.response_id else None,
            names.FINISH_REASONS: [self._name(event.finish_reason)] if event.finish_reason else None,
            names.FIRST_CHUNK: event.first_piece,
            names.REQUEST_STREAM: True if event.first_piece is not None else None,
            names.COST: event.cost,
        }
        if self._includes_content and chat.part.span.is_recording():
            facts[names.OUTPUT_MESSAGES] = self._written([message_in_parts(event.message, event.finish_reason)])
        return facts

    def _named(self, usage: Mapping[str, int]) -> dict[str, int]:
        return {names.OLDER.get(name, name): count for name, count in usage.items()} if self._older else {**usage}

    def _end_chat(
        self, chat: OpenChat, facts: dict[str, Any], error: str | None = None, said: str | None = None
    ) -> None:
        seconds = self._end(chat.part, {**facts, names.ATTEMPTS: chat.attempts}, error, said)
        if self._meters is not None:
            self._meters.request_ended(seconds, chat.about, error)

    # ---- tool calls

    def _tool_started(self, event: ToolStarted) -> None:
        run = self._runs.get(event.run_id)
        if run is None:
            return
        run.tool_calls += 1
        tool = self._name(event.tool_name)
        facts = run.about | {
            names.TOOL_NAME: tool,
            names.TOOL_TYPE: "function",
            names.TOOL_CALL_ID: self._name(event.call_id),
            names.RUN_ID: event.run_id,
        }
        call = self._begin(names.TOOL, tool, self._context_here(run.part.context), event.at, facts)
        if self._includes_content and call.span.is_recording():
            call.span.set_attribute(names.TOOL_ARGUMENTS, self._written(event.arguments))
        run.calls[event.call_id] = call

    def _tool_finished(self, event: ToolFinished) -> None:
        run, result = self._runs.get(event.run_id), event.result
        call = run.calls.pop(event.call_id, None) if run is not None else None
        if run is None or call is None:
            return
        facts: dict[str, Any] = {names.OUTCOME: result.outcome}
        if self._includes_content and result.content is not None and call.span.is_recording():
            facts[names.TOOL_RESULT] = self._written(shown(result.content))
        error = names.error_of_call(result.outcome, _kind_of(result.exception))
        self._end(call, facts, error, result.error)
        if self._meters is not None:
            about = {names.OPERATION: names.TOOL, names.TOOL_NAME: self._known(event, run)}
            self._meters.tool_ended(result.elapsed, run.about | about, error)

    def _known(self, event: ToolFinished, run: OpenRun) -> str:
        """The name of a tool, unless the model has made it up: of such names there may be any number."""
        is_made_up = run.offered and event.tool_name not in run.offered and event.result.outcome == "error"
        return names.OTHER if is_made_up and event.result.exception is None else self._name(event.tool_name)

    # ---- spans

    def _begin(
        self,
        operation: str,
        name: str,
        within: Context,
        at: float,
        facts: Mapping[str, Any],
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Open:
        since = time.monotonic()
        span = (self._tracer or _no_tracer).start_span(
            f"{operation} {name}" if name else operation,
            within,
            kind,
            attributes={names.OPERATION: operation, **facts},
            start_time=_nanoseconds(at),
        )
        context = trace.set_span_in_context(span, within)
        return Open(span, contexts.set_value(_MADE, _Made(self, span, within), context), at, since)

    def _context_here(self, own: Context | None) -> Context:
        """The context that encloses a span begun now.

        That is the current one, so that spans of the user's are in between. But if none came along, or another
        Instrumentation has put its span there, it is the one that is given.

        Args:
            own: The context of what is around it, as far as that is known here; None if nothing is.
        """
        current = contexts.get_current()
        while (made := _made(current)) is not None and made.by is not self:
            if own is not None:
                return own
            current = made.within
        if own is None or trace.get_current_span(current).get_span_context().is_valid:
            return current
        return own

    def _end(self, part: Open, facts: Mapping[str, Any], error: str | None = None, said: str | None = None) -> float:
        """End a span; returns the seconds it took."""
        span, seconds = part.span, time.monotonic() - part.since
        if span.is_recording():
            span.set_attributes({name: value for name, value in facts.items() if value is not None})
            if error is not None:
                span.set_attribute(names.ERROR_TYPE, error)
                text = self._written(said)[1:-1] if said is not None and self._includes_content else None
                span.set_status(Status(StatusCode.ERROR, text))
        span.end(_nanoseconds(part.began + seconds))
        return seconds

    def _name(self, name: str) -> str:
        return str(decode(self._payload.name(name)))

    def _written(self, value: object) -> str:
        return self._payload(value).decode()


def _global(get: Callable[[], _Provider], name: str) -> _Provider | None:
    """The global provider, or None if none is set.

    As long as there is none, OpenTelemetry's functions look into the environment each time, which is more than a run
    without an SDK should pay. So their module is asked first; one that calls the variable something else, always.
    """
    facts = get.__globals__
    return get() if name not in facts or facts[name] is not None else None


def _check(name: str, given: object, kind: type) -> None:
    if given is not None and not isinstance(given, kind):
        raise InvalidArguments(f"{name}={repr_of(given)}: give a {kind.__name__} of OpenTelemetry, or None")


def _is_silent(provider: object) -> bool:
    """Whether a provider is one of the API's own, of which nothing comes as long as there is no SDK."""
    return type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


def _is_stand_in(provider: object, no_op: type) -> bool:
    return _is_silent(provider) and not isinstance(provider, no_op)


def _made(context: Context) -> _Made | None:
    """Who has made the current span of a context, if an Instrumentation has."""
    made = contexts.get_value(_MADE, context)
    return made if isinstance(made, _Made) and made.span is trace.get_current_span(context) else None


def _kind_of(error: BaseException | None) -> str | None:
    return type_name(error) if error is not None else None


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)


class _Made(NamedTuple):
    """Who has made a span, and in which context."""

    by: Instrumentation
    span: Span
    within: Context


_MADE = contexts.create_key("fractal.made")

_Provider = TypeVar("_Provider")

_no_tracer = NoOpTracer()
_propagator = TraceContextTextMapPropagator()

_tells: dict[type, Callable[[Instrumentation, Any], None]] = {
    RunStarted: Instrumentation._run_started,  # pyright: ignore[reportPrivateUsage]
    RunFinished: Instrumentation._run_finished,  # pyright: ignore[reportPrivateUsage]
    ModelRequested: Instrumentation._requested,  # pyright: ignore[reportPrivateUsage]
    ModelResponded: Instrumentation._responded,  # pyright: ignore[reportPrivateUsage]
    ToolStarted: Instrumentation._tool_started,  # pyright: ignore[reportPrivateUsage]
    ToolFinished: Instrumentation._tool_finished,  # pyright: ignore[reportPrivateUsage]
}
