"""The command line: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.adapters import ADAPTERS
from benchmarks.run import Bench, is_installed
from benchmarks.scenarios import SCENARIOS


def chosen(options: argparse.Namespace) -> Bench:
    """What the options ask for."""
    names = options.adapter or [name for name, spec in ADAPTERS.items() if options.peers or not spec.is_peer]
    scenarios = options.scenario or [name for name, each in SCENARIOS.items() if each.in_short or not options.short]
    for name in names:
        if not is_installed(name):
            print(f"left out, since it is not installed: {name}", file=sys.stderr)
    found = [SCENARIOS[name] for name in scenarios]
    if options.tiny:
        found = [each.tiny() for each in found]
    return Bench(found, [name for name in names if is_installed(name)], options.rounds)


def run(options: argparse.Namespace) -> None:
    """Measure, show, write."""
    found = chosen(options).run()
    if options.add and options.out and options.out.exists():
        found = report.added(found, json.loads(options.out.read_text()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report.to_json(found))
    print(report.as_text(found))


def profile(options: argparse.Namespace) -> None:
    """Print where the time goes."""
    print(Bench([SCENARIOS[options.scenario]], [options.adapter], rounds=1).profile())


def write(options: argparse.Namespace) -> None:
    """Bring the documentation up to date."""
    for path in report.write(json.loads(options.file.read_text())):
        print(f"wrote {path}")


def show(options: argparse.Namespace) -> None:
    """Print what a file has."""
    print(report.as_text(json.loads(options.file.read_text())))


def names(options: argparse.Namespace) -> None:
    """Print what there is."""
    print("Scenarios:")
    for each in SCENARIOS.values():
        print(f"  {each.name:22} {each.title}")
    print("Adapters:")
    for name, spec in ADAPTERS.items():
        print(f"  {name:22} {spec.title}{'' if is_installed(name) else ' (not installed)'}")


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What an agent's run costs.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("run", help="measure")
    verb.add_argument("--scenario", action="append", choices=SCENARIOS, metavar="NAME", help="only this; repeatable")
    verb.add_argument("--adapter", action="append", choices=ADAPTERS, metavar="NAME", help="only this; repeatable")
    verb.add_argument("--peers", action="store_true", help="other frameworks too: see benchmarks/make_envs")
    verb.add_argument("--short", action="store_true", help="leave out the scenarios that take long")
    verb.add_argument("--tiny", action="store_true", help="as little as there can be, to see that it works")
    verb.add_argument("--rounds", type=int, default=3, metavar="N", help="how often (default 3)")
    verb.add_argument("--out", type=Path, metavar="FILE", help="write the numbers there, as JSON")
    verb.add_argument("--add", action="store_true", help="keep what FILE has of other scenarios")
    verb.set_defaults(do=run)
    for name, do, what in (
        ("show", show, "print the tables of a file"),
        ("report", write, "write the tables and plots of a file into docs/"),
    ):
        verb = verbs.add_parser(name, help=what)
        verb.add_argument("file", type=Path, nargs="?", default=report.RESULTS, metavar="FILE")
        verb.set_defaults(do=do)
    verb = verbs.add_parser("profile", help="print which functions take the time")
    verb.add_argument("scenario", choices=SCENARIOS, metavar="SCENARIO")
    verb.add_argument("adapter", choices=ADAPTERS, metavar="ADAPTER", nargs="?", default="fractal")
    verb.set_defaults(do=profile)
    verbs.add_parser("list", help="print the names of scenarios and adapters").set_defaults(do=names)
    return parser


if __name__ == "__main__":
    options = parser().parse_args()
    try:
        options.do(options)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except FileNotFoundError as error:
        sys.exit(f"there is no {error.filename}: measure first")
