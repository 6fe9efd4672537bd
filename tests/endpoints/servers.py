"""The servers that the tests here ask, and what each of them cannot do.

All are told to say the same to the same questions, so that the tests can be the same: aimock by its fixtures, and with
it the gateways in front of it; llama.cpp by a model that is made for that.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.served import served

KEY = "sk-test"
HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-endpoints"

SAID = "It rains in Rome."
SAY, LOOK, BOTH, NOW = "Say it.", "Look it up.", "Look up both.", "What time is it?"
CITY, STORY, CUT, CUT_CALL = "Which city?", "Tell a long story.", "Say it and be cut.", "Look it up and be cut."
THINK, FILTER, BREAK, HANG_UP = "Think, then look.", "Be filtered.", "Break down.", "Hang up."
SLOW_DOWN = "Too fast."
LONG = "Too long. " + 2000 * "blah "
LENGTH_OF_STORY = 500  # times that the story goes on, if nobody hangs up


@dataclass(frozen=True)
class Place:
    """A model behind a server.

    Attributes:
        server: Name of the server, as `scripts/test-endpoints` has it.
        model: Name of the model there.
        cannot: What of the tests it cannot do, each with the reason.
        needs: Other servers that have to be installed.
        path: Path of the base URL.
        wires: The clients that ask it; None: all.
    """

    server: str
    model: str = "tiny"
    cannot: Mapping[str, str] = field(default_factory=dict[str, str])
    needs: tuple[str, ...] = ()
    path: str = "/v1"
    wires: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Started:
    """A server that runs.

    Attributes:
        url: Where it listens, without a path.
        journal: Where aimock, which is it or is behind it, tells what it was asked; None where nobody does.
    """

    url: str
    journal: str | None = None


def _cannot(reason: str, *abilities: str) -> dict[str, str]:
    return dict.fromkeys(abilities, reason)


_SCRIPTED = _cannot("is told what to answer, and takes its time in streams only", "slow answer", "cut call", "slots")
_AIMOCK = _SCRIPTED | _cannot("takes the name of any model", "model")
_MODEL = _cannot("has a model of its own, which is not told to fail", "filter", "break down", "limit")
_MODEL |= _cannot("takes the name of any model", "model") | _cannot("has no path of Azure's", "azure")
_LITELLM = _SCRIPTED | _cannot("has no database, and answers 400 to a key that is not its own", "key")
_NO_USAGE = _cannot("has no tokens to tell, since aimock tells none in this dialect", "usage")
_NO_FINISH = _cannot("has no reasons to tell, since aimock tells none in Ollama's dialect", "cut", "filter", "thinking")


def _litellm_place(model: str, *cannot: Mapping[str, str]) -> Place:
    """The proxy does the same with the client for all models, so one of them is asked by all clients."""
    wires = None if model == "openai" else ("own HTTP",)
    every = {ability: reason for each in (_LITELLM, *cannot) for ability, reason in each.items()}
    return Place("litellm", model, every, ("aimock",), wires=wires)


PLACES: dict[str, Place] = {
    "aimock": Place("aimock", cannot=_AIMOCK),
    "aimock-openrouter": Place("aimock", cannot=_AIMOCK, path="/api/v1", wires=("own HTTP",)),
    "llama.cpp": Place(
        "llama.cpp",
        cannot=_MODEL
        | _cannot("lets the model call only the tools that there are", "unknown tool")
        | _cannot("hangs up after each stream, unannounced", "keep alive"),
    ),
    "llama-cpp-python": Place(
        "llama-cpp-python",
        cannot=_MODEL
        | _cannot(
            "leaves calls in the text, but for the models that it knows",
            *(
                "one",
                "several",
                "without arguments",
                "cut call",
                "unknown tool",
                "tool",
                "object beside tools",
                "thinking",
            ),
        )
        | _cannot("has no JSON Schema", "native")
        | _cannot("gives the parts of a text to the model's template as they are", "parts")
        | _cannot("has no tokens in its streams", "usage in a stream")
        | _cannot("ends a stream before its head where a prompt is too long", "long prompt in a stream")
        | _cannot("does not tell what it is at", "slots"),
    ),
    "litellm-openai": _litellm_place("openai"),
    "litellm-claude": _litellm_place("claude", _NO_USAGE),
    "litellm-gemini": _litellm_place("gemini", _NO_USAGE),
    "litellm-ollama": _litellm_place("ollama", _NO_USAGE, _NO_FINISH),
}


def asked_for() -> list[object]:
    """The places that are tested, as parameters: those of the environment variable, or all."""
    wanted = os.environ.get("FRACTAL_TEST_ENDPOINTS", "").split()
    return [
        pytest.param(place, id=name, marks=pytest.mark.xdist_group(place.server))
        for name, place in PLACES.items()
        if not wanted or place.server in wanted
    ]


def why_missing(place: Place) -> str | None:
    """Why a place cannot be tested, or None."""
    for server in (place.server, *place.needs):
        folder = ENVIRONMENTS / server
        if (folder / ".missing").exists():
            return f"{server} {(folder / '.missing').read_text().strip()}"
        if not (folder / ".ready").exists():
            return f"{server} is not installed: scripts/test-endpoints {place.server}"
    return None


# ---- how each is started; yields the URL without its path


@contextmanager
def _aimock() -> Iterator[Started]:
    program = ENVIRONMENTS / "aimock/node_modules/@copilotkit/aimock/dist/cli.js"
    with tempfile.TemporaryDirectory() as folder:
        fixtures = Path(folder) / "fixtures.json"
        fixtures.write_text(json.dumps(fixtures_of_aimock()))
        command = ["node", str(program), "--fixtures", str(fixtures), "--log-level", "warn"]
        environment = {**os.environ, "AIMOCK_API_KEYS": KEY}
        with served(lambda port: [*command, "--port", str(port)], "/health", environment=environment) as port:
            url = f"http://127.0.0.1:{port}"
            yield Started(url, f"{url}/__aimock/journal")


def fixtures_of_aimock() -> dict[str, object]:
    """What aimock answers: the first that matches."""
    city = {"city": "Rome", "rains": True}
    rome, paris = ({"name": "weather", "arguments": {"city": city}} for city in ("Rome", "Paris"))
    final = {"name": "final_answer", "arguments": city}
    story = "Once upon a time" + LENGTH_OF_STORY * " upon a time"
    thought = {"reasoning": "I have to look.", "reasoningSignature": "SIGNED", "toolCalls": [rome]}
    asked: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"userMessage": "Too long"}, failure(400, "It is too long.", code="context_length_exceeded")),
        ({"userMessage": SLOW_DOWN}, {**failure(429, "Slow down."), "retryAfter": 2}),
        ({"userMessage": BREAK}, failure(503, "It is out of order.")),
        ({"userMessage": FILTER}, {"content": "It rains", "finishReason": "content_filter"}),
        ({"userMessage": HANG_UP}, {"content": story}),
        ({"userMessage": THINK}, thought),
        ({"userMessage": LOOK}, {"content": "Let me look.", "toolCalls": [rome]}),
        ({"userMessage": BOTH}, {"toolCalls": [rome, paris]}),
        ({"userMessage": NOW}, {"toolCalls": [{"name": "now", "arguments": {}}]}),
        (
            {"userMessage": CITY, "toolName": "final_answer"},
            {"toolCalls": [final]},
        ),
        ({"userMessage": CITY}, {"content": city}),
        ({"userMessage": CUT}, {"content": "It rains", "finishReason": "length"}),
        ({"userMessage": STORY}, {"content": story}),
        ({}, {"content": SAID}),
    ]
    fixtures: list[dict[str, object]] = [{"match": {"hasToolResult": True}, "response": {"content": SAID}}]
    for match, response in asked:
        pace = {"latency": 20, "chunkSize": 12} if response.get("content") == story else {}
        end = {"disconnectAfterMs": 500} if match.get("userMessage") == HANG_UP else {}
        fixtures.append({"match": match, "response": response, **pace, **end})
    return {"fixtures": fixtures}


def failure(status: int, message: str, **facts: str) -> dict[str, object]:
    """A failure in the words of aimock."""
    return {"error": {"message": message, **facts}, "status": status}


@contextmanager
def _llama() -> Iterator[Started]:
    with _tiny_model("llama.cpp") as (python, model):
        command = [python, str(HERE / "serve_llama.py")]
        with served(lambda port: [*command, str(port), model, KEY], "/health") as port:
            yield Started(f"http://127.0.0.1:{port}")


@contextmanager
def _llama_python() -> Iterator[Started]:
    with _tiny_model("llama-cpp-python") as (python, model):
        command = [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", "tiny", "--api_key", KEY]
        command += ["--host", "127.0.0.1", "--n_ctx", "4096", "--n_threads", "1", "--n_threads_batch", "1"]
        with served(lambda port: [*command, "--port", str(port)], "/docs") as port:
            yield Started(f"http://127.0.0.1:{port}")


@contextmanager
def _tiny_model(server: str) -> Iterator[tuple[str, str]]:
    """The Python of a server, and the model that was written with it."""
    python = str(ENVIRONMENTS / server / "bin/python")
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/tiny.gguf"
        subprocess.run([python, str(HERE / "tiny_model.py"), model], check=True)
        yield python, model


_BEHIND_LITELLM = {"openai": "openai", "claude": "anthropic", "gemini": "gemini", "ollama": "ollama_chat"}


@contextmanager
def _litellm() -> Iterator[Started]:
    with tempfile.TemporaryDirectory() as folder, _aimock() as behind:
        bases = {"openai": f"{behind.url}/v1", "gemini": f"{behind.url}/v1beta"}
        models = [
            {
                "model_name": name,
                "litellm_params": {"model": f"{kind}/{name}", "api_base": bases.get(name, behind.url), "api_key": KEY},
            }
            for name, kind in _BEHIND_LITELLM.items()
        ]
        settings = {
            "model_list": models,
            "general_settings": {"master_key": KEY},
            "router_settings": {"num_retries": 0, "disable_cooldowns": True},
            "litellm_settings": {"telemetry": False},
        }
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(settings))  # JSON is YAML
        command = [str(ENVIRONMENTS / "litellm/bin/litellm"), "--config", str(config), "--host", "127.0.0.1"]
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it would fetch its prices
        with served(
            lambda port: [*command, "--port", str(port)],
            "/health/liveliness",
            environment=environment,
            start_seconds=120,
        ) as port:
            yield Started(f"http://127.0.0.1:{port}", behind.journal)


_STARTS: dict[str, Callable[[], AbstractContextManager[Started]]] = {
    "aimock": _aimock,
    "llama.cpp": _llama,
    "llama-cpp-python": _llama_python,
    "litellm": _litellm,
}


class Servers(ExitStack):
    """Those that run; each is started when it is first wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._started: dict[str, Started] = {}

    def started(self, server: str) -> Started:
        """A server, which is started if it does not run yet."""
        if server not in self._started:
            self._started[server] = self.enter_context(_STARTS[server]())
        return self._started[server]
