"""The chat page: what it is made of, and how it is served."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from fractal.serving._page import routes
from fractal.serving._page.routes import page_router
from tests.on_uvicorn import on_uvicorn

FOLDER = Path(routes.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.js"))


def get(url: str) -> httpx2.Response:
    return httpx2.get(url, trust_env=False)


def test_the_page_and_its_files_come_from_the_server_and_may_load_nothing_else():
    app = FastAPI()
    app.include_router(page_router(["Guide", '"><script>alert(1)</script>']), prefix="/shop")
    with on_uvicorn(app) as url:
        page = get(f"{url}/shop/")
        kinds = {name: get(f"{url}/shop/chat/{name}").headers["content-type"] for name in routes._FILES}
        odd = [get(f"{url}/shop/chat/{name}").status_code for name in ("page.html", "routes.py", "..%2froutes.py", "x")]
    assert page.status_code == 200
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "<script>alert" not in page.text
    assert {kind.partition(";")[0] for kind in kinds.values()} == {"text/css", "text/javascript"}
    assert odd == [404] * 4


def test_the_page_names_its_agents():
    app = FastAPI()
    names = ["Guide & co", 'a "b" <c>', "é"]
    app.include_router(page_router(names))
    with on_uvicorn(app) as url:
        found = Metas(get(url).text).found["fractal-agents"]
    assert json.loads(found) == names


class Metas(HTMLParser):
    """The named values in the head of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "meta" and given.get("name"):
            self.found[given["name"] or ""] = given.get("content") or ""


def test_the_files_are_all_that_there_are_and_no_more():
    assert {*routes._FILES} == {path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css")}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_put_nothing_into_the_page_that_a_browser_would_parse(path: Path):
    text = path.read_text("utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function("):
        assert word not in text


NODES = """
import { readFileSync } from "node:fs";
import { markdown } from "./text.mjs";
const made = (name) => ({ name, children: [], append(...more) { this.children.push(...more); } });
globalThis.document = { createElement: made, createDocumentFragment: () => made(""), createTextNode: (text) => text };
const shown = (it) => typeof it === "string" ? it : `<${it.name}>${it.children.map(shown).join("")}</${it.name}>`;
for (const text of JSON.parse(readFileSync(0, "utf-8"))) console.log(markdown(text).children.map(shown).join(""));
"""


def _drawn(folder: Path, texts: list[str]) -> list[str]:
    """What the page makes of markdown, as HTML."""
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not here")
    (folder / "text.mjs").write_bytes((FOLDER / "text.js").read_bytes())
    (folder / "draw.mjs").write_text(NODES)
    command, given = [node, str(folder / "draw.mjs")], json.dumps(texts)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.split("\n")[:-1]


def test_headings_have_their_marks_before_and_behind(tmp_path: Path):
    given = ["# a", "##  a b  ", "# a ##", "# a #b", "#", "# #", "### a###  ", "#a"]
    right = ["1a", "2a b", "1a", "1a #b", "1", "1", "3a###"]
    assert _drawn(tmp_path, given) == [*(f"<h{each[0]}>{each[1:]}</h{each[0]}>" for each in right), "<p>#a</p>"]


def test_no_text_takes_a_page_long_to_draw(tmp_path: Path):
    many = 5000
    odd = "\u2028"  # no end of a line in the page, and no character of one for expressions
    texts = [f"#{' ' * many}x{' ' * many}{odd}", f"#{' #' * many}{odd}", f"{'~' * 40 * many}`", f"*{' ' * many}x"]
    marks = ("*a ", "_a ", "[", "![](", "**", "<http://", "http://)", "`` ", "| ", "> ", "- ")
    texts += [mark * many for mark in marks]
    assert len(_drawn(tmp_path, texts)) >= len(texts)
