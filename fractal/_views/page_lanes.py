"""The lanes that spans are drawn in, and the critical path through them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fractal._views.page_spans import PageSpan

__all__ = ["lanes_of", "waited_for"]


@dataclass(slots=True)
class Lanes:
    """Lanes, in none of which two spans overlap.

    Attributes:
        labels: For each lane what stands before it, empty below another one of the same agent, and how deep it is.
        of_spans: The lane of each span.
    """

    labels: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    of_spans: list[int] = field(default_factory=list[int])


def lanes_of(spans: Sequence[PageSpan], last: float) -> Lanes:
    """Give each span a lane: an agent's run, below it what it did, and below that the runs it began.

    Runs of one agent that are begun by the same one, one after the other, share their lanes.

    Args:
        spans: All of a run.
        last: When those end that have no end.
    """
    lanes, below = Lanes(of_spans=[0] * len(spans)), _children(spans)
    waiting = [(slot, 0) for slot in reversed(_slots(spans, below[-1], last))]
    while waiting:
        slot, depth = waiting.pop()
        lanes.labels.append((spans[slot[0]].name if spans[slot[0]].kind == "run" else spans[slot[0]].agent, depth))
        for position in slot:
            lanes.of_spans[position] = len(lanes.labels) - 1
        parts, runs = _parts(spans, below, slot)
        count = _pack(spans, parts, last, lanes)
        lanes.labels += [("", depth)] * count
        waiting += [(each, depth + 1) for each in reversed(_slots(spans, runs, last))]
    return lanes


def _children(spans: Sequence[PageSpan]) -> dict[int, list[int]]:
    below = defaultdict[int, list[int]](list)
    for position, span in enumerate(spans):
        below[span.parent].append(position)
    return below


def _parts(spans: Sequence[PageSpan], below: dict[int, list[int]], slot: Iterable[int]) -> tuple[list[int], list[int]]:
    """The requests and calls of some runs, and the runs that they began, by their calls too."""
    parts, runs = list[int](), list[int]()
    for position in slot:
        for part in below.get(position, ()):
            (runs if spans[part].kind == "run" else parts).append(part)
            if spans[part].kind != "run":
                runs += below.get(part, ())
    return parts, runs


def _slots(spans: Sequence[PageSpan], runs: Sequence[int], last: float) -> list[list[int]]:
    """Groups of runs that share lanes: those of one agent, one after the other."""
    slots = list[list[int]]()
    free = defaultdict[str, list[tuple[float, int]]](list)  # by agent: when which slot is free
    for position in sorted(runs, key=lambda each: spans[each].start):
        span, end = spans[position], _end(spans[position], last)
        mine = free[span.name]
        if mine and mine[0][0] <= span.start:
            _, slot = heapq.heapreplace(mine, (end, mine[0][1]))
            slots[slot].append(position)
        else:
            heapq.heappush(mine, (end, len(slots)))
            slots.append([position])
    return slots


def _pack(spans: Sequence[PageSpan], parts: Iterable[int], last: float, lanes: Lanes) -> int:
    """Give each part the first lane that is free, below those that there are; returns how many it takes."""
    first, count = len(lanes.labels), 0
    free, taken = list[int](), list[tuple[float, int]]()
    for position in sorted(parts, key=lambda each: spans[each].start):
        while taken and taken[0][0] <= spans[position].start:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, count = count, count + 1
        heapq.heappush(taken, (_end(spans[position], last), lane))
        lanes.of_spans[position] = first + lane
    return count


def waited_for(spans: Sequence[PageSpan], last: float) -> list[float]:
    """The critical path: for each span the seconds that the whole run waited for it, and for nothing inside of it.

    From its end backwards a run waits for what ended last, then for what had ended last when that began, and so on;
    between these it was busy itself.

    Args:
        spans: All of a run.
        last: When those end that have no end.
    """
    seconds, below = [0.0] * len(spans), _children(spans)
    roots = [(each, _end(spans[each], last)) for each in below[-1]]
    while roots:
        position, at = roots.pop()
        start = spans[position].start
        for part in sorted(below.get(position, ()), key=lambda each: -_end(spans[each], last)):
            end = _end(spans[part], last)
            if end > at or end <= start:  # nothing that came later can have waited for it
                continue
            seconds[position] += at - end
            roots.append((part, end))
            at = max(spans[part].start, start)
        seconds[position] += max(at - start, 0.0)
    return seconds


def _end(span: PageSpan, last: float) -> float:
    return span.end if span.end is not None else max(last, span.start)
