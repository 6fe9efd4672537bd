"""Answers that an endpoint should not give: mutated completions and streams, odd arguments, broken HTTP; by seed."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.wires import call, chunk, completion, events

__all__ = ["Hostile", "hostile_answer"]


@dataclass
class Hostile:
    """One answer.

    Attributes:
        kind: What it is made of, for a failure's text.
        data: All bytes of the HTTP answer.
        pieces: How many bytes go out at a time.
        cut: Whether it ends before its last byte, so that it need not be taken for whole.
        content: What it says, where that is known.
    """

    kind: str
    data: bytes
    pieces: list[int] = field(default_factory=list[int])
    cut: bool = False
    content: str | None = None


def http(body: bytes, *headers: str, status: str = "200 OK", length: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


JSON, SSE = "Content-Type: application/json", "Content-Type: text/event-stream"

SURROGATES = ["\ud800", "\udfff", "a\ud83d", "\ude00b"]
CONTROLS = ["\x1b[2J", "\x9b31m", "\u202e", "\u200b", "\x7f", "\x00", "\r\n\r\n", "\ufeff"]
TEXTS = [*SURROGATES, *CONTROLS, "", " ", "null", "{", '{"a":', "[DONE]", "data: x", "x" * 5000, "é" * 2000]
NUMBERS: list[Any] = [-1, 0, 2**63, 2**64, -(10**9), 1e308, 1.5, True, 10**50]


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(9):
        case 0:
            return None
        case 1 | 2:
            return rng.choice(TEXTS)
        case 3:
            return rng.choice(NUMBERS)
        case 4 if depth < 3:
            return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 5 if depth < 3:
            names = rng.choices([*TEXTS, "id", "index", "type"], k=rng.randrange(4))
            return {name: odd_value(rng, depth + 1) for name in names}
        case 6:
            return nested(rng.choice([5, 150, 400, 3000]), rng.choice("[{"))
        case _:
            return rng.choice([[], {}, "", False])


def nested(depth: int, kind: str) -> str:
    """A value so deep that Python's own encoder does not go there: a word that `dumped` replaces."""
    return f"nested {kind} {depth}"


def dumped(value: Any) -> str:
    """JSON as hostile endpoints write it: with halves of characters, and with what is `nested`."""
    return re.sub(r'"nested ([\[{]) (\d+)"', _nested_json, json.dumps(value, separators=(",", ":")))


def _nested_json(found: re.Match[str]) -> str:
    depth = int(found[2])
    return '{"a":' * depth + "1" + "}" * depth if found[1] == "{" else "[" * depth + "]" * depth


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in members:
        found += places(each, (*path, key))
    return found


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one to three places changed, taken away, doubled or given another name."""
    for _ in range(rng.randint(1, 3)):
        paths = places(value)
        if not paths:
            return odd_value(rng)
        *steps, last = rng.choice(paths)
        holder = value
        for step in steps:
            holder = holder[step]
        match rng.randrange(5):
            case 0 | 1:
                holder[last] = odd_value(rng)
            case 2:
                del holder[last]
            case 3 if isinstance(holder, list):
                holder.extend([holder[last]] * rng.choice([1, 3, 2000]))
            case 4 if isinstance(holder, dict):
                holder[rng.choice([*TEXTS, "error", "x_new", "reasoning_content", "tool_calls"])] = holder.pop(last)
            case _:
                holder[last] = odd_value(rng)
    return value


def odd_arguments(rng: random.Random) -> str:
    good = '{"city": "Rome"}'
    match rng.randrange(8):
        case 0:
            return rng.choice(TEXTS)
        case 1:
            return good[: rng.randrange(len(good))]
        case 2:
            return good * rng.choice([2, 3, 500])
        case 3:
            return dumped(odd_value(rng))
        case 4:
            return '{"city": "' + rng.choice(["x", "\\ud800", "\\n", '\\"']) * rng.choice([1, 50_000]) + '"}'
        case 5:
            return good + rng.choice(["<|im_end|>", " ok", "]", "}", *CONTROLS])
        case 6:
            return rng.choice([" ", "\n", "[", "{", '"', "{}"]) * rng.choice([10, 100_000])
        case _:
            return json.dumps(good)


def message(rng: random.Random, number: int) -> dict[str, Any]:
    made: dict[str, Any] = {"content": f"answer {number}"}
    if rng.random() < 0.4:
        count = rng.choice([1, 1, 2, 5, 300, 1500])
        made["tool_calls"] = [call("look", odd_arguments(rng), rng.choice([f"c{n}", "c", ""])) for n in range(count)]
        made["content"] = rng.choice([None, "", f"answer {number}"])
    if rng.random() < 0.2:
        made[rng.choice(["reasoning_content", "reasoning_details", "extra_content", "audio"])] = odd_value(rng)
    return made


def _whole(rng: random.Random, number: int) -> Hostile:
    value = completion(message(rng, number), rng.choice(["stop", "stop", "tool_calls", "length", "error", "odd", None]))
    text = dumped(mutated(rng, value) if rng.random() < 0.8 else value)
    return Hostile("a completion", http(text.encode(), rng.choice([JSON, SSE, "X-Y: z"])))


def _deltas(rng: random.Random, number: int) -> list[Any]:
    made = message(rng, number)
    text = made.get("content") or ""
    deltas: list[dict[str, Any]] = [{"content": piece} for piece in text]
    for index, each in enumerate(made.get("tool_calls", ())[:50]):
        arguments = each["function"]["arguments"]
        step = max(1, len(arguments) // 40)
        pieces = [arguments[at : at + step] for at in range(0, len(arguments), step)] or [""]
        repeats = rng.random() < 0.3
        for position, piece in enumerate(pieces):
            one: dict[str, Any] = {"index": rng.choice([index, index, 0]), "function": {"arguments": piece}}
            if position == 0 or repeats:
                one |= {"id": each["id"]}
                one["function"]["name"] = "look"
            deltas.append({"tool_calls": [one]})
    return [chunk(delta) for delta in deltas]


def _stream(rng: random.Random, number: int) -> Hostile:
    payloads = _deltas(rng, number)
    payloads.append(chunk({}, rng.choice(["stop", "stop", "tool_calls", "length", "content_filter", "tired", "error"])))
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.randrange(len(payloads))
        payloads[at] = mutated(rng, payloads[at])
    end = rng.choice(["\n\n", "\r\n\r\n", "\r\r"])
    lines = [rng.choice(["data: ", "data:", "data:  "]) + dumped(payload) + end for payload in payloads]
    if rng.random() < 0.3:
        other = rng.choice([": ping", "event: error", "id: 1", "data: {", "error: x"])
        lines.insert(rng.randrange(len(lines)), other + end)
    body = (rng.choice(["", "", "\ufeff", "\n"]) + "".join(lines) + rng.choice(["data: [DONE]" + end, ""])).encode()
    return Hostile("a stream", http(body, rng.choice([SSE, SSE, JSON])), pieces=_cuts(rng, len(body)))


def _cuts(rng: random.Random, length: int) -> list[int]:
    return [rng.choice([1, 2, 7, 100, 5000]) for _ in range(rng.choice([0, 0, 5, 40]))]


def _good(rng: random.Random, number: int) -> Hostile:
    """An answer that is right, in an unusual form."""
    text = f"answer {number}"
    if rng.random() < 0.5:
        body = dumped(completion({"content": text}, "stop")).encode()
    else:
        body = events(*[chunk({"content": piece}) for piece in text], chunk({}, "stop")).encode()
    headers = [rng.choice([JSON, SSE, "Content-Type: text/plain", "X-Y: z"])]
    if rng.random() < 0.3:
        body, headers = gzip.compress(body), [*headers, "Content-Encoding: gzip"]
    return Hostile("a good one", http(body, *headers), content=text, pieces=_cuts(rng, len(body)))


def _cut(rng: random.Random, number: int) -> Hostile:
    good = _good(rng, number)
    return Hostile("cut", good.data[: rng.randrange(len(good.data) - 1)], cut=True, content=good.content)


def _flipped(rng: random.Random, number: int) -> Hostile:
    data = bytearray(_good(rng, number).data)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return Hostile("bytes changed", bytes(data))


def _error(rng: random.Random, number: int) -> Hostile:
    status = rng.choice(["400 x", "401 x", "404 x", "422 x", "429 x", "500 x", "503 x", "200 OK"])
    value: Any = {"error": {"message": rng.choice(TEXTS), "code": odd_value(rng), "param": odd_value(rng), "type": "t"}}
    text = dumped(mutated(rng, value)) if rng.random() < 0.8 else rng.choice(["<" * 20_000, "<style" * 3000, "oops"])
    odd = ["Content-Type: text/html", "Retry-After: 1e999", "Retry-After: Wed", "X-Request-Id: \x1b"]
    header = rng.choice([JSON, *odd])
    return Hostile("an error", http(text.encode(), header, status=status))


def _framing(rng: random.Random, number: int) -> Hostile:
    body = dumped(completion({"content": f"answer {number}"}, "stop")).encode()
    half = len(body) // 2
    chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
    coded = "Transfer-Encoding: chunked"
    odd: list[Callable[[], bytes]] = [
        lambda: http(chunks, JSON, coded, length=False),
        lambda: http(b"%x;%b\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(body), b"e=f", body), JSON, coded, length=False),
        lambda: http(b"fffffffffffffffff\r\n" + body, JSON, coded, length=False),
        lambda: http(b"-5\r\n" + body, JSON, coded, length=False),
        lambda: http(body, JSON, f"Content-Length: {len(body)}"),
        lambda: http(body, JSON, f"Content-Length: {len(body) + 1}"),
        lambda: http(body, JSON, "Content-Length: -1", length=False),
        lambda: http(body, JSON, "Content-Length: 99999999999999999999", length=False),
        lambda: http(body, JSON, "Content-Encoding: gzip"),
        lambda: http(zlib.compress(body), JSON, "Content-Encoding: deflate"),
        lambda: http(gzip.compress(body)[:-9], JSON, "Content-Encoding: gzip"),
        lambda: http(gzip.compress(gzip.compress(body)), JSON, "Content-Encoding: gzip, gzip"),
        lambda: http(gzip.compress(b" " * 20_000_000 + body), JSON, "Content-Encoding: gzip"),
        lambda: http(body, JSON, "Content-Encoding: br"),
        lambda: http(body, JSON, "X: " + "y" * 200_000),
        lambda: http(body, *["X: y"] * 3000, JSON),
        lambda: http(body, JSON, "Set-Cookie: \xff=\xfe; a=b"),
        lambda: http(b"", status="204 No Content"),
        lambda: b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + http(body, JSON),
        lambda: b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + http(body, JSON),
        lambda: http(b"", "Location: http://127.0.0.2:1/", status="307 Temporary Redirect"),
        lambda: http(b"", "Location: file:///secrets", status="302 Found"),
        lambda: b"HTTP/1.0 200 OK\r\n\r\n" + body,
        lambda: b"HTTP/2 200 OK\r\n\r\n" + body,
        lambda: body,
        lambda: b"",
        lambda: b"\x16\x03\x01\x02\x00\x01",
        lambda: http(body, JSON) + http(b'{"choices":[{"message":{"content":"of somebody else"}}]}', JSON),
    ]
    data, pieces = rng.choice(odd)(), _cuts(rng, len(body))
    if b"of somebody else" in data:
        # It comes together with the end of the first answer. What comes later can meet the next request: HTTP/1.1 has
        # no way to tell that one from the other.
        pieces = [size for size in pieces if size < len(body)][:1]
    return Hostile("framing", data, pieces=pieces)


MAKERS = [_whole, _whole, _stream, _stream, _good, _cut, _flipped, _error, _framing]


@functools.lru_cache(maxsize=64)  # whoever sends it and whoever checks what came of it ask one after the other
def hostile_answer(number: int) -> Hostile:
    """The answer of a number; the same each time."""
    rng = random.Random(number)
    return rng.choice(MAKERS)(rng, number)
