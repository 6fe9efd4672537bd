"""A page of a trace: one file of HTML with all in it, for a browser that needs no network.

What is in a trace is data there. It stands in blocks that no browser runs, without a single `<`; the page's program
shows it as text, and is the only one that may run, by the hash that the page gives of it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from fractal._json import encode
from fractal._views.page_lanes import lanes_of, waited_for
from fractal._views.page_runs import PageRuns, Row
from fractal._views.page_spans import PageSpan, RunSpans

__all__ = ["PageRuns", "page_of"]

_CHUNK = 2**20
"""Characters of one block of details; the page parses a block when a span of it is looked at."""

_MOST_CAUSES = 8


def page_of(runs: PageRuns, title: str, complaints: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of a page.

    Args:
        runs: What it shows.
        title: What stands at its top, such as the name of the file.
        complaints: What was odd about the files, a line each.
    """
    template = files("fractal").joinpath("_views", "page.html").read_text(encoding="utf-8")
    before, after = template.split("@data@")
    program = re.search(r"<script>(.*?)</script>", after, re.DOTALL)
    assert program is not None
    digest = base64.b64encode(hashlib.sha256(program[1].encode()).digest()).decode()
    yield before.replace("@hash@", digest)
    rows = [*runs]
    shown = [row for row in rows if row.detail is not None]
    blocks = {id(row): block for block, row in enumerate(shown)}
    notes = [*complaints, *runs.left_out()]
    table = [_row(row, blocks.get(id(row))) for row in rows]
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    yield _block("page", {"title": title, "made": made, "notes": notes, "rows": table})
    for block, row in enumerate(shown):
        yield from _run(row, block)
    yield after


def _block(name: str, value: object) -> str:
    """A data block of the page, without a character that begins a tag."""
    text = encode(value).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _row(row: Row, block: int | None) -> dict[str, Any]:
    names = ("run_id", "source", "agent", "input", "reason", "outcome", "start", "events", "agents", "requests")
    more = ("tools", "errors", "input_tokens", "output_tokens", "cost")
    facts = {name: getattr(row, name) for name in (*names, *more)}
    return facts | {"seconds": row.seconds, "block": block}


def _run(row: Row, block: int) -> Iterator[str]:
    detail = row.detail
    assert detail is not None
    detail.settle()
    chunks = [*_chunks(detail.spans)]
    yield _block(f"run-{block}", _facts(detail) | {"chunks": [first for first, _ in chunks]})
    for number, (_, texts) in enumerate(chunks):
        yield _block(f"run-{block}-{number}", texts)


def _chunks(spans: Sequence[PageSpan]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The details of the spans in blocks, each with the position of its first span."""
    first, size, texts = 0, 0, list[dict[str, Any]]()
    for position, span in enumerate(spans):
        texts.append(span.detail)
        size += len(encode(span.detail))
        if size > _CHUNK:
            yield first, texts
            first, size, texts = position + 1, 0, []
    if texts or not spans:
        yield first, texts


def _facts(run: RunSpans) -> dict[str, Any]:
    """The data of a run without its details: the spans by column, with each name once."""
    spans, start = run.spans, run.first
    lanes, waited = lanes_of(spans, run.last), waited_for(spans, run.last)
    names = _Names()
    columns: dict[str, Iterable[Any]] = {
        "kind": (names[span.kind] for span in spans),
        "name": (names[span.name] for span in spans),
        "agent": (names[span.agent] for span in spans),
        "outcome": (names[span.outcome] for span in spans),
        "group": (names[span.group] for span in spans),
        "parent": (span.parent for span in spans),
        "start": (round(span.start - start, 6) for span in spans),
        "end": (round((run.last if span.end is None else span.end) - start, 6) for span in spans),
        "lane": lanes.of_spans,
        "waited": (round(each, 6) for each in waited),
        "label": (span.label for span in spans),
        "input": (span.input_tokens for span in spans),
        "output": (span.output_tokens for span in spans),
        "cost": (span.cost for span in spans),
    }
    return {
        "spans": {name: [*values] for name, values in columns.items()},
        "start": start,
        "end": round(run.last - start, 6),
        "lanes": lanes.labels,
        "marks": [(round(at - start, 6), kind, text, span) for at, kind, text, span in run.marks],
        "causes": _causes(spans, waited),
        "limits": run.limits,
        "names": [*names],
    }


class _Names(dict[str, int]):
    """Numbers of texts, in the order of their first use."""

    def __missing__(self, name: str) -> int:
        number = self[name] = len(self)
        return number


def _causes(spans: Sequence[PageSpan], waited: Sequence[float]) -> list[tuple[str, str, str, float, int, int]]:
    """The longest waits of a run: kind, agent, name, seconds, how often, and the span with the longest one."""
    causes: dict[tuple[str, str, str], tuple[float, int, int]] = {}
    for position, (span, seconds) in enumerate(zip(spans, waited, strict=True)):
        if seconds <= 0:
            continue
        so_far, count, longest = causes.get(key := (span.kind, span.agent, span.name), (0.0, 0, position))
        longest = position if seconds > waited[longest] else longest
        causes[key] = so_far + seconds, count + 1, longest
    ranked = sorted(causes.items(), key=lambda each: -each[1][0])[:_MOST_CAUSES]
    return [(*key, round(seconds, 6), count, longest) for key, (seconds, count, longest) in ranked]
