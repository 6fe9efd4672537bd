"""The shape of the package: which module may import which, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fractal

PACKAGE = Path(fractal.__file__).parent

# From the bottom up; a module may import modules of its own level or below.
LEVELS = [
    [
        *(
            "",
            "cli",
            "models._replies",
            "models._clients",
            "models._http",
            "_views",
            "_agent",
            "_engine",
            "_answers",
            "_functions",
            "_concurrency",
            "errors",
            "prices",
            "_functions.docstring",
            "_json",
            "_answers.scanner",
            "_concurrency.current",
            "_concurrency.forks",
            "_functions.arguments",
            "_functions.callables",
        ),
        *("_copies", "models.bounds", "models._secrets", "_texts", "_elsewhere", "_told", "_log"),
        *("_agent.template", "_checks"),
        *("_html",),
    ],
    [
        "messages",
        "parts",
        "limits",
        "_concurrency.scopes",
        "_engine.explain",
        "_functions.returned",
        "_concurrency.grace",
        "_concurrency.stuck",
        "_concurrency.stall",
        "_concurrency.gates",
        "_concurrency.crossing",
        "_concurrency.workers",
        "_concurrency.threads",
        "_functions.marks",
        "_functions.types",
        "_functions.signature",
        "_functions.schema",
        "_concurrency.feed",
        "_concurrency.background",
        "_concurrency.feed_block",
        "approval",
        "_answers.strict",
        "_engine.twins",
        "_stored",
        "_engine.pricing",
    ],
    ["results", "context", "model", "_answers.shapes"],
    ["_engine.hooks", "toolkit", "events"],
    [
        *(
            "models._replies.usage",
            "models._replies.events",
            "models._replies.merging",
            "models._replies.reported",
            "models._masking",
        ),
        *("models._http.heads", "models._http.incoming", "models._http.decoding"),
    ],
    ["models._replies.reading", "models._faults", "models._dialect", "models._replies.thinking"],
    ["models._replies.stream_reader"],
    [
        "models._http.dialing",
        "models._http.sending",
        "models._http.redirects",
        "models._http.connecting",
        "models._http.proxies",
    ],
    ["models._http.connection", "models._http.connections", "models._http.transport", "models._http.pool"],
    ["models._replies.answer_reader"],
    ["models._http.address", "models._http.wire", "models._clients.sdk", "models._clients.object", "models._wires"],
    ["_engine.observers"],
    [
        "_engine.step",
        "_engine.window",
        "_answers.json_text",
        "_answers.output",
        "_answers.partial",
        "_answers.answer",
        "_engine.below",
        "_engine.run",
        "_engine.call",
        "_engine.overrides",
    ],
    [
        *(
            "models.openai",
            "models.combined",
            "models",
            "_engine.money",
            "_engine.approve",
            "_engine.invoke",
            "_engine.calls",
            "_engine.ask",
            "options",
        ),
        *("prompt",),
    ],
    ["_engine.loop", "_agent.settings"],
    ["streaming", "_agent.constructor", "_agent.core", "_agent.card"],
    ["_agent.verbs", "_agent.clones"],
    ["delegation", "_agent.tools"],
    ["agent"],
    ["tracing.record", "tracing.redact", "tracing.jsonl"],
    ["tracing.read", "tracing.summary", "tracing.telling", "tracing.events"],
    ["tracing.kit", "tracing"],
    [
        "_views.progress",
        "many",
        "sync._garbage",
        "sync._event_loop",
        "sync._portal",
        "sync._block",
        "sync._entered",
        "sync.streaming",
        "sync.many",
        "sync.agent",
        "sync",
        "_names",
        *("fastapi",),
    ],
    [
        "testing.answers",
        "testing._blocking",
        "testing._history",
        "testing._leftovers",
        "testing._seen_runs",
        "testing._steps",
        "testing._nothing_left",
        "testing._patching",
        "testing._recording",
        "testing._requests",
        "testing._virtual_time",
        "testing.endpoint",
        "testing.scripted",
        "testing.cancelling",
        "testing.stalling",
        "testing",
        "pytest_plugin",
    ],
    [
        "cli.files",
        "cli.door",
        "_views.tree",
        "_views.tree_html",
        "_views.terminal",
        "cli.stand_in",
        "cli.demo",
        "cli.batch",
        "cli.chat_input",
        "cli.chat_screen",
        "cli.chat_turn",
        "cli.chat",
        "cli.which_agent",
        "cli.run_tree",
        "cli.trace",
        "cli.main",
        "__main__",
    ],
]
# What needs it looks it up in sys.modules, where it is if it runs; a tool for tests makes loops of asyncio's own.
ALLOWED_ASYNCIO = {"testing._steps"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_at_run_time(path: Path) -> set[str]:
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            """Imports in functions are for later; they may point up (`run_sync` calls the facade)."""

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(path.read_text()))
    return found


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def test_every_module_has_a_level():
    assert set(MODULES) <= set(LEVEL_OF)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_level_and_below(name: str):
    imported = {
        target.removeprefix("fractal").removeprefix(".")
        for target in imports_at_run_time(MODULES[name])
        if target.split(".")[0] == "fractal"
    }
    upward = {target for target in imported if LEVEL_OF.get(target, -1) > LEVEL_OF[name]}
    assert not upward, f"{name} (level {LEVEL_OF[name]}) imports {upward}"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_of_the_library_imports_asyncio(name: str):
    if name not in ALLOWED_ASYNCIO:
        assert not {t for t in imports_at_run_time(MODULES[name]) if t.split(".")[0] == "asyncio"}


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
    unwanted |= {"httptools"}
    assert not (unwanted | {"fastapi"}) & {*loaded}


def test_importing_the_agent_class_loads_nothing_that_only_some_runs_need():
    code = "import sys; from fractal import BaseAgent; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"asyncio", "ssl", "socket", "email", "http.client", "urllib.request", "tempfile", "multiprocessing"}
    ours = {
        "_answers.partial",
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
