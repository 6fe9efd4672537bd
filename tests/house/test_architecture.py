"""The shape of the package: which module may import which, and what an import costs."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import fractal

PACKAGE = Path(fractal.__file__).parent

# From the bottom up. A module belongs to the longest name here that it begins with; it may import its own row and those
# before it, in whatever way: when it is loaded, in functions, and for types alone.
ROWS = [
    [
        *("errors", "parts", "approval", "_redact"),
        *("_texts", "_json", "_checks", "_forms", "_copies", "_log", "_html", "_elsewhere", "_stored", "_lossless"),
    ],
    ["_concurrency"],
    ["_functions"],
    [
        *("messages", "reply", "model", "prices", "limits", "results", "context", "_event", "events"),
        *("toolkit", "around", "journal"),
    ],
    ["models"],
    ["_answers"],
    ["_engine"],
    ["options", "prompt", "streaming", "tracing"],
    ["_agent"],
    ["delegation", "definition", "agent"],
    ["_views", "_batch", "many", "fastapi"],
    ["serving"],
    ["sync"],
    ["durable"],
    ["_names"],
    ["testing", "pytest_plugin"],
    ["cli", "__main__"],
]
# `run_sync` calls the facade; the package looks for its names when it is asked for one.
ALLOWED_UPWARD = {("agent", "sync"), ("", "_names")}
# What needs it looks it up in sys.modules, where it is if it runs; a tool for tests makes loops of asyncio's own.
ALLOWED_ASYNCIO = {"testing._steps"}

LONGEST = 450
"""Lines of a module."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclasses.dataclass
class Imports:
    """What a module imports: when it is loaded, in functions, and for types alone."""

    when_loaded: set[str] = dataclasses.field(default_factory=set)
    in_functions: set[str] = dataclasses.field(default_factory=set)
    for_types: set[str] = dataclasses.field(default_factory=set)

    @property
    def all(self) -> set[str]:
        return self.when_loaded | self.in_functions | self.for_types


def imports_of(path: Path) -> Imports:
    found = Imports()

    def look(node: ast.AST, names: set[str]) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                look(child, found.for_types)
            for child in node.orelse:
                look(child, names)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and names is found.when_loaded:
            names = found.in_functions
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {part for part in parts if ours(part) in MODULES}
            names.update(modules)
            if modules != parts:
                names.add(node.module or "")
        for child in ast.iter_child_nodes(node):
            look(child, names)

    look(ast.parse(path.read_text()), found.when_loaded)
    return found


def ours(name: str) -> str | None:
    """A module of the package by its name in there, which is empty for the package; None for modules of others."""
    return name.removeprefix("fractal").removeprefix(".") if name.split(".")[0] == "fractal" else None


def ours_among(names: Iterable[str]) -> set[str]:
    return {name for name in map(ours, names) if name is not None}


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROW_OF_NAME = {name: row for row, names in enumerate(ROWS) for name in names}


@functools.cache
def all_imports() -> dict[str, Imports]:
    return {name: imports_of(path) for name, path in MODULES.items()}


def row_of(name: str) -> int:
    if not name:
        return -1  # the package itself, which loads nothing
    while name not in ROW_OF_NAME:
        name, _, _ = name.rpartition(".")
        assert name, "the module has no row"
    return ROW_OF_NAME[name]


def test_a_module_imports_its_own_row_and_those_below():
    upward = {
        (name, other)
        for name, imports in all_imports().items()
        for other in ours_among(imports.all)
        if row_of(other) > row_of(name)
    }
    assert upward <= {*ALLOWED_UPWARD}


def test_no_modules_import_each_other():
    graph = {
        name: {b for b in ours_among(imports.all) - {name, ""} if (name, b) not in ALLOWED_UPWARD}
        for name, imports in all_imports().items()
    }
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    # What is left are circles, and what imports them.
    while unasked := [name for name in graph if not any(name in others for others in graph.values())]:
        for name in unasked:
            del graph[name]
    assert {name: sorted(others & graph.keys()) for name, others in graph.items()} == {}


LOADS = """
import gc, importlib, json, os, sys
from contextlib import suppress
for name in sys.argv[1].split(","):  # of others, which take the most time
    with suppress(ImportError):
        importlib.import_module(name)
gc.disable()  # and leave memory as it is, which the children share
gc.freeze()
for name in sys.argv[2:]:
    if os.fork() == 0:
        importlib.import_module(name)
        print(json.dumps([name, [each for each in sys.modules if each.split(".")[0] == "fractal"]]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, f"{name} cannot be imported alone"
"""
OTHERS = (
    "asyncio,concurrent.futures,difflib,zoneinfo,ag_ui.core,anyio,fastapi.responses,fastapi.sse,h11,httptools,httpx2,"
    "openai,opentelemetry.trace,pydantic,pytest,rich.live,trio"
)


@pytest.mark.timeout(300)
def test_each_module_can_be_imported_alone_and_loads_nothing_of_a_higher_row():
    names = [f"fractal.{name}" for name in MODULES if name not in ("", "__main__")]
    command = [sys.executable, "-c", LOADS, OTHERS, *names]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(names)
    for name, loaded in map(json.loads, lines):
        above = {other for other in ours_among(loaded) if row_of(other) > row_of(ours(name) or "")}
        assert not above, name


def names_used_of(modules: Iterable[Path]) -> dict[str, set[str]]:
    """The names of our modules that others use: `from module import name`, and `module.name`."""
    used = collections.defaultdict[str, set[str]](set)
    for path in modules:
        tree, known = ast.parse(path.read_text()), dict[str, str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (module := ours(node.module or "")) in MODULES:
                for alias in node.names:
                    inner = f"{module}.{alias.name}".lstrip(".")
                    if inner in MODULES:
                        known[alias.asname or alias.name] = inner
                    else:
                        used[module or ""].add(alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                used[known[node.value.id]].add(node.attr)
    return used


def test_a_private_module_names_what_others_use_of_it():
    of_tests = (path for folder in ("tests", "benchmarks") for path in (PACKAGE.parent / folder).rglob("*.py"))
    within, everywhere = names_used_of(MODULES.values()), names_used_of([*MODULES.values(), *of_tests])
    for name, path in MODULES.items():
        if not any(part.startswith("_") for part in name.split(".")) or name in ("_names", "__main__"):
            continue
        named = set[str]()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                named = set(ast.literal_eval(node.value))
        assert within[name] <= named, f"{name}: others use these, and __all__ does not name them"
        assert named <= everywhere[name], f"{name}: __all__ names these, and nobody uses them"


def test_no_module_of_the_library_imports_asyncio():
    with_asyncio = {
        name
        for name, imports in all_imports().items()
        if any(each.split(".")[0] == "asyncio" for each in imports.when_loaded)
    }
    assert with_asyncio <= {*ALLOWED_ASYNCIO}


def test_no_module_is_too_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_what_no_test_reaches_says_why():
    lines = [line for path in MODULES.values() for line in path.read_text().splitlines() if "pragma:" in line]
    assert lines
    assert [line for line in lines if not re.search(r"# pragma: no (cover|branch) - \w+ \w+", line)] == []


def test_importing_the_package_or_its_pytest_plugin_loads_nothing_else():
    code = "import sys, pytest; before = {*sys.modules}; import fractal.pytest_plugin; print(*{*sys.modules} - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {*loaded} == {"fractal", "fractal.pytest_plugin"}


def test_the_package_has_its_public_names_and_no_others():
    assert {*fractal.__all__} <= {*dir(fractal)}
    namespace: dict[str, object] = {}
    exec("from fractal import *", namespace)
    assert {*namespace} - {"__builtins__"} == {*fractal.__all__}
    assert fractal.parts.__name__ == "fractal.parts"
    with pytest.raises(AttributeError, match="module 'fractal' has no attribute 'Agent'"):
        _ = fractal.Agent
    with pytest.raises(ImportError, match="cannot import name 'Agent' from 'fractal'"):
        exec("from fractal import Agent", {})


def test_importing_the_agent_class_loads_no_sdk_no_backend_and_no_extra():
    code = "import sys; from fractal import BaseAgent; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"openai", "trio", "httpx2", "httpcore2", "httpx", "h11", "griffe", "rich", "uvloop", "aiohttp"}
    unwanted |= {"httptools", "opentelemetry"}
    assert not (unwanted | {"fastapi"}) & {*loaded}


def test_importing_the_agent_class_loads_nothing_that_only_some_runs_need():
    code = "import sys; from fractal import BaseAgent; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"asyncio", "ssl", "socket", "email", "http.client", "urllib.request", "tempfile", "multiprocessing"}
    ours = {
        "_answers.partial",
        "_answers.kinds",
        "_answers.shapes",
        "_answers.scanner",
        "models._clients.sdk",
        "models._clients.object",
        "models._http.dialing",
        "models._http.connection",
        "sync",
        "cli.main",
    }
    assert not (unwanted | {f"fractal.{name}" for name in ours}) & {*loaded}


def test_a_run_without_a_client_loads_no_sdk():
    code = (
        "import sys, anyio; from fractal import BaseAgent, OpenAIModel\n"
        "agent = BaseAgent('A', 'a', client=OpenAIModel(base_url='http://127.0.0.1:1/v1', api_key='sk-test'))\n"
        "result = anyio.run(lambda: agent.run('go', max_retries=0))\n"
        "print(type(result.exception).__name__, 'openai' in sys.modules, 'httpx2' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["ConnectionFailed", "False", "True"]


def test_building_an_agent_with_tools_needs_no_key_and_loads_no_sdk():
    code = (
        "import sys; from fractal import BaseAgent, sync, tool\n"
        "@tool\ndef add(a: int, b: int = 1) -> int:\n    'Add.'\n    return a + b\n"
        "agent = BaseAgent('A', 'You add.').add_tool(add); str(agent); agent.get_tool_schemas()\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""}
    ).stdout.split()
    assert not {"openai", "trio", "httpx2", "griffe"} & {*loaded}
