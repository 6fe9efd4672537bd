"""The page of a trace in a real browser: what is seen, what a click does, and that nothing in it runs or calls out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal import TraceEvent
from fractal._views.page import PageRuns, page_of
from tests.browser import IN_BROWSER, chromium, note_faults, playwright
from tests.pages import HOSTILE, real, told

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def a_run() -> list[TraceEvent]:
    return real()


@pytest.fixture(scope="module")
def browser(a_run: list[TraceEvent]) -> Iterator[Any]:  # the driver has an event loop: what needs one comes before it
    with chromium() as one:
        yield one


class Opened:
    """A page that is open, and what it did that it should not."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = context.new_page()
        self.faults: list[str] = []
        note_faults(self.page, self.faults)
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri())
        self.settle()

    def _requested(self, request: Any) -> None:
        if not (request.is_navigation_request() and request.url.startswith("file:")):
            self.faults.append(f"request: {request.url}")

    def settle(self) -> None:
        """Wait until the page has drawn what there is to draw."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def texts(self, where: str) -> list[str]:
        return self.page.locator(where).all_inner_texts()

    def text(self, where: str) -> str:
        return self.page.locator(where).inner_text()

    def until(self, where: str, text: str) -> None:
        playwright.expect(self.page.locator(where)).to_contain_text(text, timeout=20_000)

    def close(self) -> None:
        self.page.context.close()
        assert self.faults == []


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens pages of events."""
    pages: list[Opened] = []

    def open_page(events: list[TraceEvent], **options: Any) -> Opened:
        runs = PageRuns()
        for event in events:
            runs.take(event, "trace.jsonl")
        path = tmp_path / "page.html"
        path.write_text("".join(page_of(runs, "trace.jsonl")), encoding="utf-8")
        pages.append(Opened(browser, path, **options))
        return pages[-1]

    yield open_page
    for each in pages:
        each.close()


def parallel() -> list[TraceEvent]:
    """Three calls side by side, one of which fails, and one that has no end."""
    return [
        told("agent_start", arguments={"user_input": "look around"}),
        told("model_request", 0, metadata={"model": "m", "opening": [{"role": "system", "content": "be good"}]}),
        told("model_response", 1, result={"content": "well"}, metadata={"input_tokens": 70, "output_tokens": 7}),
        *(told("tool_call", 1, tool_name=each, tool_call_id=each, arguments={"q": each}) for each in ("one", "two")),
        told("tool_call", 1, tool_name="three", tool_call_id="three"),
        told("tool_result", 3, tool_name="one", tool_call_id="one", result="the needle is here"),
        told("error", 4, tool_name="two", tool_call_id="two", error="Boom"),
        told("tool_result", 4, tool_name="two", tool_call_id="two", error="Boom", metadata={"outcome": "error"}),
        told("warning", 5, metadata={"message": "mind the gap"}),
    ]


def lane(page: Opened, number: int, share: float) -> None:
    """Click into a lane, at a part of the whole time."""
    box = page.page.locator("#lanes").bounding_box()
    tall = page.page.evaluate("LANE()")
    page.page.mouse.click(box["x"] + share * page.page.evaluate("pageWidth()"), box["y"] + (number + 0.5) * tall)
    page.settle()


def test_a_run_is_shown_with_what_happened_and_why(opened: Any, a_run: list[TraceEvent]):
    page = opened(a_run)
    assert "go on" in page.text("#title")
    assert "finished" in page.text("#what")
    assert "2 agent runs" in page.text("#what")
    assert page.text("#why-stop") == "The model gave its last word."
    assert page.page.locator("#causes button").count() > 0
    names = [text.splitlines()[-1] for text in page.texts(".row .name")]
    assert names[:2] == ["Chief", "large"]
    assert sorted(names) == sorted(["Chief", "large", "search", "ask", "Below", "small", "✗ search", "small", "large"])


def test_why_a_run_was_cut_is_said_once(opened: Any):
    late = "the run did not finish within 1 s"
    limit = told("limit", 1.01, metadata={"limit": "deadline", "message": late})
    ended = told("agent_end", 1.02, error=late, metadata={"success": False, "stop_reason": "deadline"})
    page = opened([told("agent_start", metadata={"timeout": 1}), limit, ended])
    assert page.text("#why-stop") == "Its time was over. The run did not finish within 1 s."


def test_the_lanes_are_those_of_the_events(opened: Any):
    page = opened(parallel())
    assert page.page.locator("#lanes").get_attribute("data-lanes") == "4"
    for number, share, name in ((0, 0.5, "A"), (1, 0.1, "m"), (1, 0.5, "one"), (2, 0.5, "two"), (3, 0.9, "three")):
        lane(page, number, share)
        assert page.text("#panel h2") == name
    lane(page, 2, 0.95)  # nothing is there
    assert page.text("#panel h2") == "three"


def test_a_click_in_the_tree_opens_the_details(opened: Any):
    page = opened(parallel())
    page.page.locator(".row", has_text="two").click()
    assert page.text("#panel h2") == "two"
    assert "Boom" in page.text("#panel")
    assert "✗ error" in page.text("#panel .badge")
    assert page.page.locator(".row[aria-selected=true] .name").inner_text() == "✗ two"


def test_on_a_narrow_screen_what_was_chosen_comes_into_sight(opened: Any):
    page = opened(parallel(), width=320, height=640)
    in_sight = "const side = document.getElementById('side').getBoundingClientRect(); side.top >= 0 && side.top < 384"
    assert not page.page.evaluate(in_sight)
    page.page.locator(".row", has_text="two").click()
    assert page.page.evaluate(in_sight)
    page.page.evaluate("scrollTo(0, 0)")
    page.page.keyboard.press("c")
    assert page.page.evaluate(in_sight)


def test_what_has_no_end_is_marked(opened: Any):
    page = opened(parallel())
    assert "… three" in page.texts(".row .name")
    assert "unfinished" in page.text("#what")
    assert "It was in the middle of three" in page.text("#why-stop")


def test_the_conversation_is_what_the_model_saw(opened: Any, a_run: list[TraceEvent]):
    page = opened(a_run)
    page.page.locator(".row", has_text="large").last.click()
    page.page.get_by_role("button", name="What the model saw").click()
    said = page.texts("#panel .message")
    assert "You lead." in said[0]
    assert "go on" in said[1]
    assert "calls ask" in said[2]
    assert "found x" in said[3]
    assert "deep" in said[4]
    assert "done" in said[5]
    assert "Tools on offer: search, ask" in page.text("#panel")


def test_search_and_filters_find_what_fits(opened: Any):
    page = opened(parallel())
    page.page.fill("#search", "needle")
    page.until("#found", "1 of 5")
    page.page.keyboard.press("Enter")
    assert page.text("#panel h2") == "one"
    page.page.fill("#search", "")
    page.until("#found", "5 steps")
    page.page.select_option("#by-outcome", "error")
    page.until("#found", "1 of 5")
    assert page.texts(".row:not(.faded) .name") == ["✗ two"]
    page.page.select_option("#by-outcome", "")
    page.page.select_option("#by-name", "m")
    page.until("#found", "1 of 5")
    page.page.select_option("#by-name", "")
    page.page.select_option("#by-agent", "A")
    page.until("#found", "5 of 5")


def test_moments_are_listed(opened: Any):
    page = opened(parallel())
    page.page.click("#tab-marks")
    assert "mind the gap" in page.text("#panel")
    page.page.locator("#panel .message", has_text="Boom").get_by_role("button").click()
    assert page.text("#panel h2") == "two"


def test_keys_move_zoom_and_search(opened: Any):
    page = opened(parallel())
    press = page.page.keyboard.press
    page.page.focus("#lanes")
    press("ArrowDown")
    assert page.text("#panel h2") == "m"
    press("ArrowRight")
    assert page.text("#panel h2") == "one"
    press("ArrowUp")
    assert page.text("#panel h2") == "A"
    press("+")
    assert page.page.evaluate("run.to - run.from") == pytest.approx(2.5)
    press("0")
    assert page.page.evaluate("run.to - run.from") == pytest.approx(5)
    press("/")
    assert page.page.evaluate("document.activeElement.id") == "search"
    press("Escape")
    page.page.focus("#tree-scroll")
    press("End")
    assert page.text("#panel h2") == "three"
    press("Home")
    press("ArrowLeft")
    assert page.texts(".row .name") == ["… A"]
    press("t")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"
    press("?")
    assert page.page.locator("#legend").is_visible()


def test_wheel_and_drag_move_in_time(opened: Any):
    page = opened(parallel())
    box = page.page.locator("#axis").bounding_box()
    page.page.mouse.move(box["x"] + 10, box["y"] + 5)
    page.page.keyboard.down("Control")
    page.page.mouse.wheel(0, -100)
    page.page.keyboard.up("Control")
    page.settle()
    wide = page.page.evaluate("run.to - run.from")
    assert wide < 5
    page.page.mouse.move(box["x"] + 300, box["y"] + 5)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 100, box["y"] + 5, steps=4)
    page.page.mouse.up()
    assert page.page.evaluate("run.from") > 0
    assert page.page.evaluate("run.to - run.from") == pytest.approx(wide)


def test_hostile_content_stays_text(opened: Any):
    page = opened(
        [
            told("agent_start", agent_name=HOSTILE, arguments={"user_input": HOSTILE}),
            told("model_request", 1, agent_name=HOSTILE, metadata={"model": HOSTILE, "tools": [HOSTILE]}),
            told("model_response", 2, agent_name=HOSTILE, result={"content": HOSTILE}),
            told("tool_call", 3, agent_name=HOSTILE, tool_name=HOSTILE, tool_call_id="1", arguments={HOSTILE: HOSTILE}),
            told("tool_result", 4, agent_name=HOSTILE, tool_name=HOSTILE, tool_call_id="1", error=HOSTILE),
            told("warning", 5, agent_name=HOSTILE, metadata={"message": HOSTILE}),
        ]
    )
    for number in range(page.page.locator(".row").count()):
        page.page.locator(".row").nth(number).click()
        assert "<script>alert(1)</script>" in page.text("#panel")
        page.page.click("#tab-talk")
        page.page.click("#tab-details")
    page.page.click("#tab-marks")
    page.page.fill("#search", "<img")
    page.until("#found", "of 3")
    assert page.page.locator("img, a, iframe, object, embed").count() == 0
    assert page.page.locator("script:not([type])").count() == 1
    whole = page.page.evaluate("document.body.innerText + document.title")
    assert "\u202e" not in whole
    assert "\\u{202e}" in whole


def test_a_page_may_not_run_what_somebody_puts_into_it(browser: Any, tmp_path: Path):
    text = "".join(page_of(PageRuns(), "t"))
    injected = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    (tmp_path / "page.html").write_text(text.replace("<noscript>", injected + "<noscript>"))
    page = Opened(browser, tmp_path / "page.html")
    assert page.page.title() == "Fractal trace"
    assert any("Content Security Policy" in fault for fault in page.faults)
    page.page.context.close()


def test_several_runs_are_a_table_and_a_click_opens_one(opened: Any):
    def run(number: int, seconds: float) -> list[TraceEvent]:
        who = {"run_id": f"r{number}", "metadata": {"run": f"r{number}"}}
        begin = told("agent_start", number, arguments={"user_input": f"question {number}"}, **who)
        return [begin, told("agent_end", number + seconds, **who)]

    page = opened([event for number, seconds in ((1, 3), (2, 9), (3, 6)) for event in run(number, seconds)])
    inputs = lambda: page.texts("#run-rows td[data-label=input]")  # noqa: E731
    assert inputs() == ["question 3", "question 2", "question 1"]
    page.page.get_by_role("button", name="time").click()
    assert inputs() == ["question 2", "question 3", "question 1"]
    page.page.fill("#find-run", "question 1")
    assert inputs() == ["question 1"]
    page.page.locator("#run-rows tr").first.click()
    page.until("#title", "question 1")
    page.page.click("#back")
    playwright.expect(page.page.locator("#runs")).to_be_visible()
    page.page.go_back()
    page.until("#title", "question 1")


@pytest.mark.parametrize("width", [320, 1280])
def test_the_table_of_runs_fits_its_window(width: int, opened: Any):
    events = [told("agent_start", n, run_id=f"{n:032x}", arguments={"user_input": "word " * 30}) for n in range(3)]
    page = opened(events, width=width)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.page.locator("#run-rows .badge.unfinished").count() == 3


def test_texts_can_be_selected_and_copied(opened: Any):
    page = opened(parallel())
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.locator(".row", has_text="one").click()
    page.page.locator("#panel section", has_text="Result").get_by_role("button").click()
    assert page.page.evaluate("navigator.clipboard.readText()") == "the needle is here"
    page.page.evaluate("getSelection().selectAllChildren(document.querySelector('#panel'))")
    assert "the needle is here" in page.page.evaluate("String(getSelection())")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(320, 640), (768, 1024), (1280, 800), (3840, 2160)])
def test_a_page_fits_its_window(width: int, height: int, scheme: str, opened: Any, a_run: list[TraceEvent]):
    page = opened(a_run, width=width, height=height, scheme=scheme)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.page.locator("#lanes").bounding_box()["height"] > 100
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 20, 24)")
    if folder := os.environ.get("FRACTAL_PICTURES"):  # to look at them
        (Path(folder) / f"page-{width}-{scheme}.png").write_bytes(page.page.screenshot())


def test_a_page_of_many_events_opens_soon_and_draws_what_is_in_sight(opened: Any):
    def turn(number: int) -> list[TraceEvent]:
        call = {"tool_name": f"t{number % 7}", "tool_call_id": str(number)}
        return [told("tool_call", number, **call), told("tool_result", number + 3, result="x" * 100, **call)]

    events = [told("agent_start"), *(event for number in range(25_000) for event in turn(number))]
    page = opened(sorted(events, key=lambda event: event.timestamp))
    assert int(page.page.locator("html").get_attribute("data-drawn")) < 10_000
    assert page.text("#found") == "25\u202f001 steps"
    assert page.page.locator(".row").count() < 200
    page.page.fill("#search", "t3")
    page.until("#found", "of 25\u202f001")
    page.page.keyboard.press("Enter")
    assert page.text("#panel h2") == "t3"
