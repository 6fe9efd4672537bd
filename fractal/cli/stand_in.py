"""`fractal endpoint`: a stand-in for a model on this machine, to try things without a key."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fractal._json import is_list, is_mapping
from fractal.cli.door import show, tell
from fractal.testing import answers
from fractal.testing.endpoint import Endpoint, RecordedRequest

__all__ = ["play", "run_endpoint", "without_proxy"]


def run_endpoint(port: int, command: Sequence[str]) -> int:
    """Serve until Ctrl-C, or as long as a command runs that gets the endpoint's address.

    Args:
        port: Where to listen; 0 leaves it to the system.
        command: The command and its arguments; none: serve until Ctrl-C.

    Returns:
        The exit status: that of the command, 0 without one.

    Raises:
        EndpointError: The port is taken.
        OSError: The command cannot be started.
    """
    with Endpoint(_answer, port=port) as endpoint:
        if command:
            return _run_with(endpoint.url, command)
        tell(f"a stand-in for a model answers at {endpoint.url}; Ctrl-C ends it. In another terminal:")
        show(f"export OPENAI_BASE_URL={endpoint.url}")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    raise AssertionError("nobody sets the event")


def _run_with(url: str, command: Sequence[str]) -> int:
    with without_proxy() as environment:
        # The SDK wants a key, whatever it is.
        variables = {"OPENAI_API_KEY": "none"} | environment | {"OPENAI_BASE_URL": url}
        with _passing_on_sigterm() as name, subprocess.Popen(command, env=variables) as process:
            name(process)
            while True:
                try:
                    status = process.wait()
                    return status if status >= 0 else 128 - status  # of a signal, as shells say it
                except KeyboardInterrupt:
                    continue  # the command has been told as well, and says how it ends


@contextmanager
def _passing_on_sigterm() -> Generator[Callable[[subprocess.Popen[bytes]], None]]:
    """Pass SIGTERM, which reaches only this process, on to another; yields what names that one, once it has begun."""
    named: list[subprocess.Popen[bytes]] = []
    came: list[bool] = []

    def end(*_: object) -> None:
        came.append(True)
        for process in named:
            process.terminate()

    def name(process: subprocess.Popen[bytes]) -> None:
        named.append(process)
        if came:  # before it was named
            process.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield name
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def without_proxy() -> Generator[dict[str, str]]:
    """Keep requests to this machine away from the environment's proxy; yields the environment."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    os.environ |= {name: ",".join(filter(None, (value, "127.0.0.1"))) for name, value in before.items()}
    try:
        yield dict(os.environ)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _answer(request: RecordedRequest) -> answers.Answer:
    try:
        return play(request)
    except (KeyError, TypeError, AttributeError, IndexError):
        return answers.failure(400, "the stand-in cannot read this request", code="invalid_request")


def play(request: RecordedRequest) -> answers.Answer:
    """Answer as a model that takes each question as simply as possible.

    It calls the tools that the question names, or the first one, with arguments out of the question; then it says what
    they said. Where the request wants an object, that is the answer.
    """
    messages: list[dict[str, Any]] = request.body["messages"]
    schemas = [tool["function"] for tool in request.body.get("tools") or ()]
    asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    question = _text(messages[asked].get("content"))
    results = [_text(message.get("content")) for message in messages[asked:] if message["role"] == "tool"]
    wanted: Any = request.body.get("response_format")
    if not schemas and is_mapping(wanted) and "json_schema" in wanted:
        return answers.text(json.dumps(_arguments(wanted["json_schema"]["schema"], question)))
    if results:
        return answers.text("; ".join(results))
    if not schemas:
        return answers.text(f"You asked: {question}")
    named = [schema for schema in schemas if _is_named(schema["name"], question)] or schemas[:1]
    return answers.calls(
        *(answers.call(each["name"], _arguments(each.get("parameters") or {}, question)) for each in named)
    )


def _text(content: object) -> str:
    if is_list(content):
        return " ".join(str(part.get("text", "")) for part in content if is_mapping(part))
    return "" if content is None else str(content)


def _is_named(tool_name: str, question: str) -> bool:
    words = {word.rstrip("s") for word in re.findall(r"[a-z]{4,}", question.lower())}
    name = {word.rstrip("s") for word in re.findall(r"[a-z]{4,}", tool_name.lower())} - {"delegate"}
    return bool(words & name)


def _arguments(schema: Mapping[str, Any], question: str) -> dict[str, Any]:
    return _Writer(schema.get("$defs", {}), question).members(schema, 0)


_DEEPEST = 4  # values inside each other that are written of a type that contains itself


class _Writer:
    """A writer of values for JSON Schemas, from a question."""

    def __init__(self, definitions: Mapping[str, Any], question: str) -> None:
        self._definitions, self._question = definitions, question

    def members(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """An object with its required members."""
        schema = self._resolved(schema)
        members = schema.get("properties", {})
        return {name: self._value(name, members.get(name, {}), depth + 1) for name in schema.get("required", ())}

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def _value(self, name: str, schema: Mapping[str, Any], depth: int) -> Any:
        schema = self._resolved(schema)
        if "enum" in schema or "const" in schema:
            return schema.get("enum", [schema.get("const")])[0]
        if "anyOf" in schema:
            return self._value(name, schema["anyOf"][-1 if depth > _DEEPEST else 0], depth)
        return self._of_type(schema.get("type"), name, schema, depth)

    def _of_type(self, kind: object, name: str, schema: Mapping[str, Any], depth: int) -> Any:
        match kind:
            case "object":
                return self.members(schema, depth)
            case "array":
                return [] if depth > _DEEPEST else [self._value(name, schema.get("items", {}), depth + 1)]
            case "integer" | "number":
                numbers = re.findall(r"\d+", self._question)
                return int(numbers[0][:9]) if numbers else 2
            case "boolean":
                return True
            case "null":
                return None
            case _ if name in ("query", "question", "text"):
                return self._question
            case _:
                # "What is the weather in Rome?" is about Rome.
                return (re.findall(r"\b[A-Z]\w+", self._question) or ["nothing"])[-1]
