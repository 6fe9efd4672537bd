"""What is handed out: what is imported is declared, and what belongs to the project is in it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import fractal

PACKAGE = Path(fractal.__file__).parent
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

ANYWAY = {"pyproject.toml", "README.md", "LICENSE", ".gitignore", "PKG-INFO"}
"""What a source distribution has in any case."""


def imported_names() -> set[str]:
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"fractal"}


def plain(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].replace("_", "-").lower()


def test_what_is_imported_is_declared():
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    declared = {plain(requirement) for group in groups for requirement in group}
    declared.add("pydantic-core")  # pydantic's other half, of the version that it names
    owners = packages_distributions()
    made_by = {name: {plain(owner) for owner in owners.get(name, [name])} for name in imported_names()}
    assert {name for name, owned_by in made_by.items() if not owned_by & declared} == set()


def test_what_is_declared_has_a_lowest_version():
    for requirement in PROJECT["project"]["dependencies"]:
        assert ">=" in requirement


def test_the_source_distribution_has_all_of_the_project():
    included = {entry.strip("/") for entry in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    ignored = {line.strip("/ \n") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    there = {path.name for path in ROOT.iterdir()} - ignored - {".git"}
    assert {name for name in there if not any(Path(name).match(pattern) for pattern in ignored if pattern)} <= (
        included | ANYWAY
    )
    assert {"docs", "tests", "scripts", ".ci", "fractal"} <= included


def test_no_text_advises_to_install_what_the_index_has_under_our_name():
    assert PROJECT["project"]["name"] == "fractal-anyio"
    texts = [ROOT / "pyproject.toml", *ROOT.glob("*.md"), *(ROOT / "scripts").iterdir(), *(ROOT / ".ci").iterdir()]
    for folder in ("fractal", "docs", "examples", "benchmarks", "tests"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    installed = r"(?:pip|uv|pipx|uvx|poetry)\b[^\n`]*?\s['\"]?fractal(?!-anyio)(?:\[|\b(?![-./_]))"
    advice = re.compile(installed + r"|[\"']fractal\[")
    others = {path for path in texts if path != Path(__file__) and advice.search(path.read_text(encoding="utf-8"))}
    assert others == set()


@pytest.mark.parametrize("name", ["setup", "check", "test", "test-lowest", "demo", "bench", "pictures"])
def test_scripts_can_be_called(name: str):
    assert (ROOT / "scripts" / name).stat().st_mode & 0o100
