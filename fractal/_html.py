"""What a notebook shows of a result, an agent, a stream, a batch or an event: small HTML, escaped and bounded.

All text in it may be a model's, a tool's or an endpoint's: it can neither become a tag nor steer how a page is read.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

from fractal._json import is_mapping, text_of
from fractal._texts import one_line, printable, str_of

__all__ = [
    "Markup",
    "bar",
    "card",
    "line",
    "of_agent",
    "of_event",
    "of_progress",
    "of_result",
    "of_rows",
    "of_tool_result",
]

LONGEST_TEXT = 4_000
LONGEST_LINE = 160
MOST_ROWS = 50

_WHO = frozenset({"run_id", "parent_id", "agent_name", "depth", "at", "kind"})


def of_result(result: Any, title: str = "") -> str:
    """The card of a result: answer, tool calls, usage."""
    parts = [block(result.content if result.success else result.error)]
    if result.tool_results:
        longest = max([result.elapsed, *(call.elapsed for call in result.tool_results)], default=0.0) or 1.0
        rows = (_row_of(call, longest) for call in result.tool_results)
        parts.append(of_rows(("call", "outcome", "seconds", "", "result"), rows))
    parts += [_note(f"warning: {line(warning)}") for warning in islice(result.warnings, 5)]
    ended = "answered" if result.success else f"no answer ({line(result.stop_reason)})"
    used = f"{_used(result.usage)}, {result.elapsed:.2f} s"
    return card(f"{title}<b>{line(result.agent_name)}</b> {ended}, {used}", *parts)


def of_tool_result(result: Any) -> str:
    """The card of a tool call's result."""
    title = f"<b>{line(result.tool_name)}</b>{line(_given(result))} {line(result.outcome)}, {result.elapsed:.2f} s"
    return card(title, block(result.content if result.error is None else result.error))


def of_agent(agent: object) -> str:
    """An agent's card."""
    return card("", block(str_of(agent)))


def of_event(event: Any) -> str:
    """The card of an event: its agent, and its facts in a line each."""
    facts = {each.name: getattr(event, each.name) for each in fields(event) if each.name not in _WHO}
    result: Any = facts.pop("result", None)
    kind = line(getattr(event, "kind", type(event).__name__))
    table = of_rows((), facts.items()) if facts else ""
    # That of a run, or of a tool call.
    inner = "" if result is None else of_result(result) if hasattr(result, "usage") else of_tool_result(result)
    return card(f"<b>{kind}</b> of {line(event.agent_name)}", table, inner)


def of_progress(text: str, done: int, total: int | None) -> str:
    """The progress of some work, as a bar."""
    value = "" if total is None else f' max="{max(total, 1)}" value="{done}"'
    return card("", f"<progress{value}></progress> {line(text)}")


def card(title: str, *parts: str) -> str:
    """HTML with a title line above its parts."""
    head = f"<div>{title}</div>" if title else ""
    return f'<div class="fractal">{head}{"".join(parts)}</div>'


def _cell(value: object) -> str:
    return str(value) if type(value) is Markup else line(value)


def block(value: object) -> str:
    """A text of several lines."""
    text = value if isinstance(value, str) else text_of(value)
    shown = printable(text[:LONGEST_TEXT]) + ("…" if len(text) > LONGEST_TEXT else "")
    return f'<pre style="white-space:pre-wrap;unicode-bidi:isolate">{html.escape(shown)}</pre>'


def line(value: object) -> str:
    """A text in one line."""
    return html.escape(_brief(value))


def of_rows(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts, cut after so many rows."""
    left = iter(rows)
    body = ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in islice(left, MOST_ROWS)]
    more = sum(1 for _ in left)
    head = "<tr>" + "".join(f"<th>{line(name)}</th>" for name in heads) + "</tr>" if heads else ""
    return f"<table>{head}{''.join(body)}</table>" + (_note(f"and {more} more") if more else "")


class Markup(str):
    """HTML that is made here, of numbers alone."""

    __slots__ = ()


def bar(start: float, length: float, outcome: str) -> Markup:
    """A bar in a timeline.

    Args:
        start: Where it begins, as a part of the whole.
        length: How long it is, likewise.
        outcome: How that ended which it stands for; it is seen in the colour alone.
    """
    left = 100 * min(max(start, 0.0), 1.0)
    width = min(100 * max(length, 0.0), 100 - left)
    colour = _COLOURS.get(outcome, "#c0392b")
    inner = f"margin-left:{left:.1f}%;width:{width:.1f}%;min-width:2px;height:0.7em;background:{colour}"
    return Markup(f'<div style="width:14em"><div style="{inner}"></div></div>')


_COLOURS = {"ok": "#2e8b57", **dict.fromkeys(("timeout", "cancelled", "abandoned", "unfinished"), "#c98a00")}


def _row_of(call: Any, longest: float) -> tuple[object, ...]:
    said = call.content if call.error is None else call.error
    took = bar(0.0, call.elapsed / longest, call.outcome)  # when it began is known to traces alone
    return call.tool_name + _given(call), call.outcome, f"{call.elapsed:.2f}", took, said


def _given(call: Any) -> str:
    given: object = call.metadata.get("arguments")
    if not is_mapping(given):
        return "" if given is None else f"({_brief(given)})"
    return f"({', '.join(f'{_brief(name)}={_brief(value)}' for name, value in islice(given.items(), 10))})"


def _used(usage: Any) -> str:
    return (
        f"{usage.requests} requests, {usage.tool_calls} tool calls, {usage.input_tokens}+{usage.output_tokens} tokens"
    )


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else text_of(value)
    return one_line(text, LONGEST_LINE) + ("…" if len(text) > LONGEST_LINE else "")


def _note(text: str) -> str:
    return f"<div><small>{text}</small></div>"
