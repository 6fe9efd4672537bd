"""Random programs: tools begin runs in every way there is, cuts come at random; what was promised holds.

In virtual time a seed repeats all that happens; with threads it repeats the program, and the moments are chance. To
look for more, play other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import pytest

from fractal import sync
from tests.played import Stage
from tests.programs import LOOP_KINDS, make
from tests.support import LOOPS

KINDS = [kind for kind in LOOP_KINDS if kind.split()[0] in LOOPS]

FEW = 12
"""Programs of each kind that are played always; each makes one to four runs."""


@pytest.fixture(params=KINDS)
def stage_of(request: pytest.FixtureRequest) -> Iterator[tuple[str, Stage]]:
    kind: str = request.param
    loop = kind.split()[0]
    if kind != loop:  # in virtual time, where there are no threads
        yield kind, Stage(loop, None)
        return
    with sync.portal(**LOOPS[loop]) as portal:
        stage = Stage(loop, portal)
        yield kind, stage
        stage.close()


def test_a_random_program_leaves_nothing_and_swallows_no_cancellation(stage_of: tuple[str, Stage]):
    kind, stage = stage_of
    play(kind, stage, range(FEW))


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.timeout(900)
def test_twenty_thousand_runs_of_random_programs_leave_nothing_and_swallow_no_cancellation(
    stage_of: tuple[str, Stage], record_property: Callable[[str, object], None]
):
    kind, stage = stage_of
    seeds = count(FEW)
    # How many runs a program makes depends on how far it comes before it is cut, and so on the machine.
    while stage.runs <= 20_000 / len(LOOP_KINDS):
        play(kind, stage, [*islice(seeds, 100)])
    record_property("numbers", f"random programs on {kind}: {next(seeds) - FEW}, of {stage.runs} runs")


def play(kind: str, stage: Stage, seeds: Sequence[int]) -> None:
    for seed in seeds:
        stage.play(make(kind, seed))
