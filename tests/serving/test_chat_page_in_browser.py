"""The chat page in a real browser: a conversation as somebody has it who sits before it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI

from fractal import BaseAgent, tool
from fractal.serving import ServedRuns, agent_router, serving_lifespan
from fractal.serving._page.routes import page_router
from fractal.testing import Endpoint, answers
from tests.browser import IN_BROWSER, chromium, note_faults, playwright
from tests.on_uvicorn import on_uvicorn

pytestmark = IN_BROWSER

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


class Chat:
    """A page that is open, and what it did that it should not."""

    def __init__(self, browser: Any, url: str, *, width: int = 1000, height: int = 800, scheme: str = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.url, self.page = url, context.new_page()
        self.faults: list[str] = []
        self.expected = ""
        note_faults(self.page, self.faults)
        self.page.on("request", self._requested)
        self.page.goto(url)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:,")):
            self.faults.append(f"request: {request.url}")

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.keyboard.press("Enter")

    def has_answered(self) -> None:
        playwright.expect(self.page.locator("html")).to_have_attribute("data-busy", "false", timeout=20_000)

    def until(self, where: str, text: str) -> None:
        playwright.expect(self.page.locator(where)).to_contain_text(text, timeout=20_000)

    def text(self, where: str) -> str:
        return self.page.locator(where).inner_text()

    def count(self, where: str) -> int:
        return self.page.locator(where).count()

    def close(self) -> None:
        self.page.context.close()
        assert [fault for fault in self.faults if not (self.expected and self.expected in fault)] == []


@contextmanager
def served(*agents: BaseAgent, **options: Any) -> Iterator[str]:
    runs = ServedRuns({agent.name: agent for agent in agents}, **{"on_disconnect": "detach", **options})
    app = FastAPI(lifespan=serving_lifespan(runs, grace=0))
    app.include_router(agent_router(runs))
    app.include_router(page_router(runs.agents))
    with on_uvicorn(app, timeout_graceful_shutdown=1) as url:
        yield url


@pytest.fixture
def chat(browser: Any) -> Iterator[Callable[..., Chat]]:
    """Serves agents and opens their page."""
    with ExitStack() as stack:

        def open_page(*agents: BaseAgent, through: Any = None, on_disconnect: str = "detach", **options: Any) -> Chat:
            url = stack.enter_context(served(*agents, on_disconnect=on_disconnect))
            if through is not None:
                url = stack.enter_context(through(url))
            one = Chat(browser, f"{url}/", **options)
            stack.callback(one.close)
            return one

        yield open_page


MARKDOWN = """# A plan

First
**bold**, then *slanted*, `code` and a [link](https://example.test/a).

- one
- two
  - inner

1. first
2. second

| what | when |
|---|---|
| sights | morning |

```python
print("<b>no tag</b>")
```

> quoted"""


def test_an_answer_is_streamed_as_markdown(chat: Any, endpoint: StartEndpoint):
    endpoint(answers.text(MARKDOWN, chunk_delay=0.005))
    page = chat(BaseAgent("Guide", "g"))
    assert page.page.title() == "Guide"
    page.ask("a plan, please")
    page.until(".said h1", "A plan")
    page.has_answered()
    assert page.text(".asked") == "a plan, please"
    assert page.page.locator(".said p").first.inner_text().startswith("First\nbold, then")
    assert page.text(".said strong") == "bold"
    assert page.text(".said em") == "slanted"
    assert page.text(".said p code") == "code"
    assert page.page.locator(".said a").get_attribute("href") == "https://example.test/a"
    assert page.page.locator(".said a").get_attribute("rel") == "noopener noreferrer nofollow"
    assert page.page.locator(".said ul > li").all_inner_texts() == ["one", "two\ninner", "inner"]
    assert page.page.locator(".said ol > li").all_inner_texts() == ["first", "second"]
    assert page.page.locator(".said td").all_inner_texts() == ["sights", "morning"]
    assert page.text(".said pre") == 'print("<b>no tag</b>")'
    assert page.text(".said blockquote") == "quoted"
    assert page.text(".end").startswith("finished")


def test_a_conversation_goes_on_with_its_history(chat: Any, endpoint: StartEndpoint):
    one = endpoint(["hello", "again", "new"])
    page = chat(BaseAgent("Guide", "g"))
    page.ask("hi")
    page.has_answered()
    page.ask("and?")
    page.has_answered()
    assert [each["content"] for each in one.requests[1].body["messages"]] == ["g", "hi", "hello", "and?"]
    page.page.reload()
    assert page.page.locator(".said").all_inner_texts() == ["hello", "again"]
    page.page.keyboard.press("Alt+n")
    assert page.count(".turn") == 0
    page.ask("once more")
    page.has_answered()
    assert [each["content"] for each in one.requests[2].body["messages"]] == ["g", "once more"]


class Steps:
    """A tool that goes on when it is told to."""

    def __init__(self) -> None:
        self.go_on, self.ended = threading.Event(), threading.Event()

    @property
    def tool(self) -> Any:
        @tool
        async def look(what: str) -> dict[str, Any]:
            """Look at something."""
            try:
                while not self.go_on.is_set():  # noqa: ASYNC110 - it is set in another thread
                    await anyio.sleep(0.01)
                if what == "nothing":
                    raise LookupError("it is not there")
                return {"seen": what}
            finally:
                self.ended.set()

        return look


def test_tool_calls_are_cards_with_arguments_and_outcome(chat: Any, endpoint: StartEndpoint):
    calls = [answers.call("look", {"what": "the sea"}), answers.call("look", {"what": "nothing"})]
    endpoint([answers.calls(*calls, text="Let me look."), "Blue."])
    steps = Steps()
    page = chat(BaseAgent("Guide", "g").add_tool(steps.tool))
    page.ask("how is the sea?")
    playwright.expect(page.page.locator(".card .badge.running")).to_have_count(2)
    page.until("#state", "look runs")
    steps.go_on.set()
    page.has_answered()
    first, second = page.page.locator(".card").all()
    assert "what: the sea" in first.inner_text()
    assert "ok" in first.locator(".badge").inner_text()
    first.locator("summary").click()
    assert first.locator(".args").inner_text() == '{\n "what": "the sea"\n}'
    assert first.locator(".result").inner_text() == '{\n "seen": "the sea"\n}'
    assert "failed" in second.locator(".badge").inner_text()
    second.locator("summary").click()
    assert second.locator(".result").inner_text() == "the tool failed"
    assert page.page.locator(".said").all_inner_texts() == ["Let me look.", "Blue."]
    page.page.click(".times summary")
    assert page.count(".times .bar.model") == 2
    assert page.count(".times .bar.tool") == 1
    assert page.count(".times .bar.error") == 1


def test_delegates_are_nested(chat: Any, endpoint: StartEndpoint):
    endpoint(
        [
            answers.call("delegate_to_below", {"query": "why?"}),
            answers.calls(answers.call("look", {"what": "x"}), text="I look."),
            "the deep reason",
            "because",
        ]
    )
    steps = Steps()
    steps.go_on.set()
    below = BaseAgent("Below", "b").add_tool(steps.tool)
    page = chat(BaseAgent("Guide", "g").register_delegate(below))
    page.ask("why?")
    page.has_answered()
    outer = page.page.locator(".answer > .card.delegate")
    assert outer.locator("> summary .name").inner_text() == "Below"
    assert outer.locator(".inner .said").all_inner_texts() == ["I look.", "the deep reason"]
    assert outer.locator(".inner .card .name").inner_text() == "look"
    assert page.page.locator(".answer > .said").all_inner_texts() == ["because"]
    page.page.click(".times summary")
    assert page.count(".times .bar.delegate") == 1
    labels = ["Guide: model", "Below", "· Below: model", "· look", "· Below: model", "Guide: model"]
    assert page.page.locator(".times .label").all_inner_texts() == labels


@pytest.mark.parametrize("decision", ["allow", "deny"])
def test_approvals_are_buttons(decision: str, chat: Any, endpoint: StartEndpoint):
    one = endpoint([answers.call("pay", {"euros": 7}), "well"])
    paid: list[int] = []

    @tool(requires_approval=True)
    def pay(euros: int) -> str:
        """Pay somebody."""
        paid.append(euros)
        return "paid"

    page = chat(BaseAgent("Guide", "g").add_tool(pay))
    page.ask("pay")
    page.until("#state", "pay needs your approval")
    page.until(".approval", "Pay somebody.")
    page.page.reload()  # who has to decide may look again
    page.until("#state", "pay needs your approval")
    assert paid == []
    page.page.click(f".approval .{decision}")
    page.has_answered()
    assert paid == ([7] if decision == "allow" else [])
    assert page.count(".approval") == 0
    assert ("ok" if decision == "allow" else "denied") in page.text(".card .badge")
    told = one.requests[1].body["messages"][-1]["content"]
    assert told == ("paid" if decision == "allow" else "Error: denied: not approved")


class Payments:
    """A tool that pays, if somebody allows it."""

    def __init__(self) -> None:
        self.paid: list[tuple[int, str]] = []

    @property
    def tool(self) -> Any:
        @tool(requires_approval=True)
        def pay(euros: int, to: str) -> str:
            """Pay somebody."""
            self.paid.append((euros, to))
            return "paid"

        return pay


def test_arguments_can_be_changed_by_keyboard_before_a_call_is_allowed(chat: Any, endpoint: StartEndpoint):
    endpoint([answers.call("pay", {"euros": 7, "to": "Ann\u202e"}), "well"])
    payments = Payments()
    page = chat(BaseAgent("Guide", "g").add_tool(payments.tool))
    page.ask("pay")
    page.until(".approval", "Pay somebody.")
    keyboard, area = page.page.keyboard, page.page.locator(".approval textarea")
    assert not area.is_visible()
    page.page.locator(".approval .allow").focus()
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("Enter")
    playwright.expect(area).to_be_focused()
    assert area.input_value() == '{\n "euros": 7,\n "to": "Ann\\u202e"\n}', "nothing steers the order of what is read"
    faults = {'{"euros": ': "This is not JSON", "[1]": "have to be an object", f'{{"euros": {10**20}}}': "digits"}
    for wrong, said in faults.items():
        keyboard.press("Control+a")
        keyboard.type(wrong)
        keyboard.press("Control+Enter")
        page.until(".approval [role=alert]", said)
        playwright.expect(area).to_be_focused()
        assert area.get_attribute("aria-invalid") == "true"
    keyboard.press("Control+a")
    keyboard.type('{"euros": 5, "to": "Bob/Co"}')
    assert not page.page.locator(".approval [role=alert]").is_visible()
    assert payments.paid == []
    keyboard.press("Control+Enter")
    page.has_answered()
    assert payments.paid == [(5, "Bob/Co")]
    assert '"to": "Bob/Co"' in page.text(".card .args")


def test_escape_takes_back_what_was_changed_and_stops_nothing(chat: Any, endpoint: StartEndpoint):
    endpoint([answers.call("pay", {"euros": 7, "to": "Ann"}), "well"])
    payments = Payments()
    page = chat(BaseAgent("Guide", "g").add_tool(payments.tool))
    page.ask("pay")
    page.page.click(".approval .change")
    page.page.fill(".approval textarea", "{}")
    page.page.keyboard.press("Escape")
    playwright.expect(page.page.locator(".approval .change")).to_be_focused()
    assert not page.page.locator(".approval textarea").is_visible()
    page.until("#state", "pay needs your approval")
    page.page.click(".approval .allow")
    page.has_answered()
    assert payments.paid == [(7, "Ann")]


def test_arguments_that_a_script_would_change_are_not_edited(chat: Any, endpoint: StartEndpoint):
    endpoint([answers.call("pay", {"euros": 12345678901234567890, "to": "Ann"}), "well"])
    payments = Payments()
    page = chat(BaseAgent("Guide", "g").add_tool(payments.tool))
    page.ask("pay")
    page.until(".approval", "Pay somebody.")
    assert not page.page.locator(".approval .change").is_visible()
    page.page.click(".approval .allow")
    page.has_answered()
    assert payments.paid == [(12345678901234567890, "Ann")]


@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_can_be_stopped_and_its_tools_are_cancelled(way: str, chat: Any, endpoint: StartEndpoint):
    one = endpoint([answers.call("look", {"what": "x"}), "and on we go"])
    steps = Steps()
    page = chat(BaseAgent("Guide", "g").add_tool(steps.tool))
    page.ask("go")
    page.until("#state", "look runs")
    if way == "button":
        page.page.click("#stop")
    else:
        page.page.keyboard.press("Escape")
    page.has_answered()
    assert steps.ended.is_set()
    assert page.text(".end").startswith("cancelled")
    assert "cancelled" in page.text(".card .badge")
    page.ask("go on")
    page.has_answered()
    assert page.page.locator(".said").all_inner_texts() == ["and on we go"]
    assert len(one.requests) == 2


WORDS = " ".join(f"word{number}" for number in range(150))


def test_a_reload_in_the_middle_of_an_answer_loses_no_word(chat: Any, endpoint: StartEndpoint):
    one = endpoint(answers.text(WORDS, chunk_delay=0.01))
    page = chat(BaseAgent("Guide", "g"))
    page.ask("go")
    for word in ("word20", "word70"):
        page.until(".said", word)
        page.page.reload()
    page.has_answered()
    assert page.text(".said") == WORDS
    assert page.count(".turn") == 1
    assert len(one.requests) == 1


def test_a_reload_before_the_first_word_begins_no_second_run(chat: Any, endpoint: StartEndpoint):
    one = endpoint(answers.text("at last", delay=1))
    page = chat(BaseAgent("Guide", "g"))
    page.ask("go")
    page.until("#state", "…")
    one.wait_for_requests(1)
    page.page.reload()
    page.has_answered()
    assert page.text(".said") == "at last"
    assert len(one.requests) == 1


class Wire:
    """A way to a server that can be cut."""

    def __init__(self) -> None:
        self.open: list[socket.socket] = []
        self.is_down = threading.Event()

    @contextmanager
    def to(self, url: str) -> Iterator[str]:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_server(("127.0.0.1", 0)) as door:
            door.settimeout(0.05)
            is_over, threads = threading.Event(), list[threading.Thread]()

            def pump(source: socket.socket, sink: socket.socket) -> None:
                with suppress(OSError):
                    while piece := source.recv(65536):
                        sink.sendall(piece)
                for each in (source, sink):
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)

            def accept() -> None:
                while not is_over.is_set():
                    with suppress(TimeoutError):
                        caller, _ = door.accept()
                        if self.is_down.is_set():
                            caller.close()
                            continue
                        caller.settimeout(None)
                        server = socket.create_connection((host, int(port)))
                        self.open += [caller, server]
                        for pair in ((caller, server), (server, caller)):
                            threads.append(threading.Thread(target=pump, args=pair))
                            threads[-1].start()

            acceptor = threading.Thread(target=accept)
            acceptor.start()
            try:
                yield f"http://127.0.0.1:{door.getsockname()[1]}"
            finally:
                is_over.set()
                acceptor.join(5)
                self.cut()
                for thread in threads:
                    thread.join(5)
                for each in self.open:
                    each.close()

    def cut(self) -> None:
        for each in self.open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def test_a_lost_connection_is_taken_up_again_without_losing_a_word(chat: Any, endpoint: StartEndpoint):
    one = endpoint(answers.text(WORDS, chunk_delay=0.01))
    wire = Wire()
    page = chat(BaseAgent("Guide", "g"), through=wire.to)
    page.expected = "net::ERR_"
    page.ask("go")
    page.until(".said", "word20")
    wire.cut()
    page.until(".said", "word60")
    wire.is_down.set()
    wire.cut()
    page.until("#state", "The connection is lost")
    wire.is_down.clear()
    page.has_answered()
    assert page.text(".said") == WORDS
    assert len(one.requests) == 1


HOSTILE = """<script>document.title = 'run'</script> <img src=x onerror="document.title = 'run'">

[click](javascript:document.title='run') ![picture](https://elsewhere.test/pixel.png) <https://ok.test/a>

[data](data:text/html,<script>alert(1)</script>) \u202ebackwards\u202c

| <b>cell</b> |
|---|
| <i>x</i> |

```html
</code><script>alert(2)</script>
```"""


def test_hostile_markdown_and_html_stay_text(chat: Any, endpoint: StartEndpoint):
    endpoint([answers.call("look", {"what": HOSTILE}), HOSTILE])

    @tool
    def look(what: str) -> str:
        """Look."""
        return what

    agent = BaseAgent("<img src=x onerror=alert(1)>", "g").add_tool(look)
    page = chat(agent)
    page.ask(HOSTILE)
    page.has_answered()
    page.page.click(".card summary")
    assert page.page.title() == "<img src=x onerror=alert(1)>"
    assert page.count("main img, main iframe, main object, main script, main style, main b, main i:not(.bar)") == 0
    links = [each.get_attribute("href") for each in page.page.locator("main a").all()]
    assert links == ["https://elsewhere.test/pixel.png", "https://ok.test/a"]
    said = page.text(".said")
    assert "<script>document.title = 'run'</script>" in said
    assert "[click](javascript:" in said
    assert "\\u{202e}backwards" in said
    whole = page.page.evaluate("document.body.innerText")
    assert "\u202e" not in whole


def test_an_error_is_told(chat: Any, endpoint: StartEndpoint):
    endpoint([answers.failure(401, "wrong key sk-secret"), "well"])
    page = chat(BaseAgent("Guide", "g"))
    page.expected = "502"
    page.ask("hi")
    page.has_answered()
    assert "the model could not answer" in page.text(".end.bad")
    assert "secret" not in page.page.content()
    page.ask("again")
    page.has_answered()
    assert page.page.locator(".said").all_inner_texts() == ["well"]


def test_a_server_that_cancels_with_its_clients_says_so_after_a_reload(chat: Any, endpoint: StartEndpoint):
    one = endpoint(answers.text(WORDS, chunk_delay=0.01))
    page = chat(BaseAgent("Guide", "g"), on_disconnect="cancel")
    page.ask("go")
    page.until(".said", "word20")
    page.page.reload()
    page.has_answered()
    assert page.text(".said").startswith("word0 word1 word2")
    assert page.text(".end").startswith("cancelled")
    one.wait_for_disconnects(1)


def test_one_of_several_agents_is_chosen(chat: Any, endpoint: StartEndpoint):
    one = endpoint("hi")
    page = chat(BaseAgent("Guide", "I guide"), BaseAgent("Cook", "I cook"))
    page.page.select_option("#agent", "Cook")
    page.ask("hi")
    page.has_answered()
    page.page.reload()
    assert page.page.locator("#agent").input_value() == "Cook"
    assert one.requests[0].body["messages"][0]["content"] == "I cook"


def test_keys_write_lines_find_the_question_and_change_nothing_else(chat: Any, endpoint: StartEndpoint):
    endpoint("hi")
    page = chat(BaseAgent("Guide", "g"))
    assert page.page.evaluate("document.activeElement.id") == "question"
    page.page.keyboard.type("one")
    page.page.keyboard.press("Shift+Enter")
    page.page.keyboard.type("two")
    assert page.count(".turn") == 0
    page.page.focus("#theme")
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "light"
    page.page.keyboard.press("/")
    page.page.keyboard.press("Enter")
    page.has_answered()
    assert page.text(".asked") == "one\ntwo"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_the_page_fits_its_window(width: int, height: int, scheme: str, chat: Any, endpoint: StartEndpoint):
    endpoint(
        [
            answers.call("delegate_to_below", {"query": "why? " * 30}),
            answers.call("look", {"what": "w" * 300}),
            "deep",
            f"{MARKDOWN}\n\n{'long' * 100} https://example.test/{'x' * 200}",
        ]
    )
    steps = Steps()
    steps.go_on.set()
    agent = BaseAgent("Guide", "g").register_delegate(BaseAgent("Below", "b").add_tool(steps.tool))
    page = chat(agent, width=width, height=height, scheme=scheme)
    page.ask("go " * 60)
    page.has_answered()
    page.page.click(".times summary")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.page.evaluate("document.getElementById('talk').scrollWidth") <= width
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 20, 24)")
    if folder := os.environ.get("FRACTAL_PICTURES"):  # to look at them
        (Path(folder) / f"chat-{width}-{scheme}.png").write_bytes(page.page.screenshot())


def test_a_long_answer_is_drawn_as_fast_as_it_comes(chat: Any, endpoint: StartEndpoint):
    text = "\n\n".join(f"Paragraph {number} with **some** `words` in it." for number in range(3000))
    endpoint(text)
    page = chat(BaseAgent("Guide", "g"))
    page.ask("go")
    page.has_answered()
    assert page.count(".said p") == 3000


N = 20_000
TEDIOUS = {
    "stars": "*a " * N,
    "brackets": "[" * N + "](" * N,
    "ticks": "`a" * N,
    "under a head": "|a|\n" + "-" * N + "x",
    "rows": "|a|\n|-|\n" * 3000,
    "quotes": "> " * N,
    "items in items": "".join(" " * (2 * depth) + "- a\n" for depth in range(200)),
    "addresses": "http://" * N + "<http://" * N,
    "spaces": "# " + " " * N + "x",
}


def test_no_text_takes_the_page_long(chat: Any, endpoint: StartEndpoint):
    endpoint("never")
    page = chat(BaseAgent("Guide", "g"))
    took = """async (text) => {
        const { markdown } = await import("/chat/text.js"), began = performance.now();
        markdown(text);
        return performance.now() - began;
    }"""
    slow = {name: page.page.evaluate(took, text) for name, text in TEDIOUS.items()}
    assert {name: ms for name, ms in slow.items() if ms > 1500} == {}
