"""Every example of the documentation runs, and every link and name in it is there.

The Python blocks of a page run in order and share one namespace. One that begins with a file's name, as in `# shop.py`,
is that file, which later blocks import. A block with a bare `await` runs as in a notebook
cell. Where a block has `#>` comments, they are what it prints. A stand-in for a model answers over HTTP on this
machine, that of `fractal endpoint`: it calls tools and repeats what they told it.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # noqa: F401  # loaded here, so that no deadline of an example pays for it
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

import fractal
import fractal.durable
import fractal.fastapi
import fractal.serving
import fractal.sync
import fractal.testing
from fractal.cli.stand_in import play
from fractal.testing import Endpoint
from tests.house.test_architecture import ROWS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PUBLIC = [fractal, fractal.sync, fractal.durable, fractal.fastapi, fractal.serving, fractal.testing]
SUBFOLDERS = {"_http", "_clients", "_replies"}  # of models, named beside it
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"^[ \t]*#> ?(.*)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_CELL = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- who plays the model


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """The endpoint of the examples; no other can be reached."""
    with Endpoint(play) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(socket, "getaddrinfo", _only_this_machine(socket.getaddrinfo))
        yield endpoint


@pytest.fixture(autouse=True)
def _no_captured_stream() -> Iterator[None]:
    """DBOS logs to the standard error that there was first, and of a test that is closed at its end."""
    yield
    logging.getLogger("dbos").handlers.clear()


def _only_this_machine(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def look_up_here(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        assert name in (None, "localhost", "127.0.0.1", "::1"), f"an example wants to reach {name}"
        return look_up(host, *arguments, **options)

    return look_up_here


# ---- running the blocks


@dataclass(frozen=True)
class Block:
    """A Python block of a page, with empty lines above so that a traceback shows the page's own line."""

    page: Path
    line: int
    source: str

    @property
    def file_name(self) -> str | None:
        named = re.match(r"# (\w+\.py)\n", self.source)
        return named[1] if named else None

    @property
    def expected(self) -> str | None:
        lines = _OUTPUT.findall(self.source)
        return "\n".join(lines) if lines else None

    def compiled(self) -> types.CodeType:
        source = "\n" * (self.line - 1) + self.source
        return compile(source, str(self.page), "exec", flags=_CELL, dont_inherit=True)


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in _FENCE.finditer(text)
        if match[1] == "python"
    ]


@contextmanager
def notebook(namespace: dict[str, Any], backend: str) -> Iterator[Callable[[Block], None]]:
    """Runs the blocks of a page; those with a bare `await` share an event loop, as the cells of a notebook do."""
    with ExitStack() as opened:
        portal: BlockingPortal | None = None

        def run(block: Block) -> None:
            nonlocal portal
            code = block.compiled()
            if not code.co_flags & inspect.CO_COROUTINE:
                exec(code, namespace)
                return
            portal = portal or opened.enter_context(start_blocking_portal(backend))
            portal.call(eval, code, namespace)

        yield run


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks of a page share: a module, since pydantic and pickle look classes up in theirs."""
    module = types.ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return vars(module)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if blocks_of(path)], ids=page_id)
@pytest.mark.usefixtures("model")
def test_the_examples_of_a_page_run_and_print_what_it_says(
    path: Path,
    backend: str,
    namespace: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    files = [block for block in blocks_of(path) if block.file_name]
    if files:
        monkeypatch.syspath_prepend(tmp_path)
    for block in files:
        (tmp_path / str(block.file_name)).write_text(block.source, encoding="utf-8")
    with notebook(namespace, backend) as run:
        for block in blocks_of(path):
            if block in files:
                continue
            capsys.readouterr()
            run(block)
            printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
            assert block.expected in (None, printed), f"{page_id(path)}, block at line {block.line}: {printed}"
    for block in files:
        sys.modules.pop(str(block.file_name).removesuffix(".py"), None)


def test_no_example_has_a_name_that_hides_it_from_the_tests():
    """`py`, `python3` or an indented fence would be Python that nobody runs."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(_FENCE.findall(text)), f"{page_id(path)}: a fence that is not understood"
        assert {name for name, _ in _FENCE.findall(text)} <= {"python", "sh", "text", "mermaid"}, page_id(path)


# ---- links and names


def anchors_of(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", TEXTS, ids=page_id)
def test_relative_links_lead_somewhere(path: Path):
    for link in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors_of(found), f"{link}: there is no such heading"


def test_every_page_can_be_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(_LINK.findall(index))


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module: types.ModuleType):
    section = _section(ROOT / "docs" / "reference.md", module.__name__)
    missing = [name for name in module.__all__ if not re.search(rf"`{name}\b", section)]
    assert not missing


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_the_reference_has_no_name_that_is_not_there(module: types.ModuleType):
    names_and_events, _, _ = _section(ROOT / "docs" / "reference.md", module.__name__).partition("### Verbs")
    names = re.findall(r"^\| `(\w+)", names_and_events, re.MULTILINE)
    assert names
    assert not [name for name in names if not hasattr(module, name)]


def _section(path: Path, title: str) -> str:
    """The text under a second-level heading that is a module's name."""
    sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    [found] = [section for section in sections if section.startswith(f"`{title}`")]
    return found


def test_the_architecture_page_has_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The house")[2].partition("\n## ")[0]
    rows = [
        {*re.findall(r"`(\w+)/?`", row)} for row in re.findall(r"^\| [^|`]+\| (`.+?`[^|]*) \|", section, re.MULTILINE)
    ]
    assert [row - SUBFOLDERS for row in rows] == [{*names} - {"__main__"} for names in ROWS]


def test_the_errors_page_has_every_error():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert not [name for name in fractal.errors.__all__ if f"`{name}`" not in page]


def test_the_errors_page_has_every_stop_reason_and_outcome():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    words = [*fractal.StopReason.__args__, *fractal.Outcome.__args__]
    assert not [word for word in words if f"`{word}`" not in page]


def test_the_limits_in_the_documentation_are_those_there_are():
    page = (ROOT / "docs" / "timeouts-and-cancellation.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` ", page, re.MULTILINE))
    assert named == set(fractal.Limits.__dataclass_fields__)


# ---- docstrings


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fractal.__path__, "fractal.")
    if module.name.rpartition(".")[2] != "__main__"
)


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


WITH_DOCTESTS = [name for name in MODULES if ">>> " in source_of(name)]


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_the_doctests_of_a_module_pass(name: str):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for case in doctest.DocTestFinder().find(module):
        runner.run(case, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)


def test_the_python_blocks_of_docstrings_compile():
    for name in MODULES:
        for node in ast.walk(ast.parse(source_of(name))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for language, source in _FENCE.findall(inspect.cleandoc(ast.get_docstring(node) or "")):
                if language == "python":
                    compile(source, name, "exec", flags=_CELL, dont_inherit=True)


def test_there_are_doctests_at_all():
    """That the finder above finds something."""
    cases = [case for name in WITH_DOCTESTS for case in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(len(case.examples) for case in cases) > 20


# ---- what the pages say and an example alone cannot show


def _run(arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=30, env=environment, check=True
    )
    return done.stdout


def test_importing_the_package_loads_no_sdk_and_no_trio():
    loaded = _run(["-c", "import json, sys, fractal; print(json.dumps(sorted(sys.modules)))"])
    assert not {"openai", "trio", "httpx2", "rich", "griffe"} & set(json.loads(loaded))


def test_the_commands_of_the_documentation_exist():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Command line")
    commands = set(re.findall(r"^\| `fractal (\w+)", section, re.MULTILINE))
    told = _run(["-m", "fractal", "--help"])
    assert commands
    assert all(re.search(rf"^ +{command} ", told, re.MULTILINE) for command in commands)


_NOTEBOOK = """
import asyncio
from IPython.core.interactiveshell import InteractiveShell

async def main():
    shell = InteractiveShell.instance()
    for cell in (
        "from fractal import BaseAgent, sync; agent = BaseAgent('Guide', 'You know Rome.')",
        "print((await agent.run('Where is the Forum?')).content)",
        "print(sync.run(agent, 'Where is the Forum?').content)",
    ):
        (await shell.run_cell_async(cell, transformed_cell=cell)).raise_error()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("model")
def test_a_notebook_cell_may_await_and_may_block():
    pytest.importorskip("IPython")
    assert _run(["-W", "error::RuntimeWarning", "-c", _NOTEBOOK]).split("\n")[-3:] == [
        "You asked: Where is the Forum?",
        "You asked: Where is the Forum?",
        "",
    ]


_CELLS = """
import asyncio, contextlib, io, json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
where, *cells = json.load(sys.stdin)
printed = []

def run(cell):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        shell.run_cell(cell).raise_error()
    printed.append(said.getvalue())

async def run_in_running_loop(cell):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        (await shell.run_cell_async(cell, transformed_cell=shell.transform_cell(cell))).raise_error()
    printed.append(said.getvalue())

async def notebook():
    for cell in cells:
        await run_in_running_loop(cell)

if where == "notebook":
    asyncio.run(notebook())
else:
    for cell in cells:
        run(cell)
print(json.dumps(printed))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("where", ["notebook", "terminal"])
def test_the_tutorial_can_be_typed_into_ipython_as_it_stands(where: str):
    pytest.importorskip("IPython")
    blocks = blocks_of(ROOT / "docs" / "tutorial.md")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", _CELLS],
        input=json.dumps([where, *(block.source for block in blocks)]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    for block, said in zip(blocks, printed, strict=True):
        assert block.expected in (None, "\n".join(line.rstrip() for line in said.strip().splitlines())), block.line


@pytest.mark.parametrize("name", ["bench", "demo", "test", "check", "setup"])
def test_the_scripts_of_the_readme_can_be_started(name: str):
    assert os.access(ROOT / "scripts" / name, os.X_OK)
