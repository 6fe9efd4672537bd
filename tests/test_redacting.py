"""What no trace may hold: secrets by value, by form and by the name of their field; and how much it holds at most."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from fractal._redact import REDACTED, PayloadWriter, Redactor, capped, redacted, secrets_of_environment

SECRETS = [
    "sk-proj-abcdefghijklmnop1234",
    "pk-lf-abcdefgh-1234",
    "sk_live_abcdefghijklmnop",
    "rk_test_abcdefghijklmnop",
    "ghp_abcdefghijklmnopqrst123456",
    "github_pat_11ABCDEFG0abcdefghijkl",
    "xoxb-1234567890-abcdef",
    "AIzaSyA1234567890abcdefghijklmnop",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMIIEow cut off",
]

IN_TEXTS = [
    ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
    ("authorization: basic dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA=="),
    ("send it with bearer abcdefgh12345678 please", "abcdefgh12345678"),
    ('{"api_key": "abc123def456"}', "abc123def456"),
    ('"{\\"api_key\\": \\"abc123def456\\"}"', "abc123def456"),
    ("api-key=abc123def456&x=1", "abc123def456"),
    ("export DB_PASSWORD='hunter2hunter2'", "hunter2hunter2"),
    ("my_client_secret = s3cr3ts3cr3t", "s3cr3ts3cr3t"),
    ("access_token=abc123def456", "abc123def456"),
    ("https://host/path?key=abc123def456&q=1", "abc123def456"),
    ("https://host/path?sig=abc123def456", "abc123def456"),
    ("postgres://user:hunter2hunter2@host/db", "hunter2hunter2"),
    ("https://user:p%40ss@host/", "p%40ss"),
]

ORDINARY = [
    "the key to success is hard work",
    "max_tokens: 4096, total_tokens=123456",
    "a token of my appreciation",
    "https://example.org/a:b/c",
    "see https://example.org:8080/path?q=keyboard",
    "passwords should be long",
    "basic algebra, design, signals",
    "task-based risk-averse desk-top",
    "",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda text: text[:12])
def test_a_text_that_is_nothing_but_a_key_is_seen_to_have_one(secret: str) -> None:
    assert json.loads(PayloadWriter()(secret)) == REDACTED


@pytest.mark.parametrize("secret", SECRETS, ids=lambda text: text[:12])
@pytest.mark.parametrize("around", ["{}", "it is {}", "a {} b", "({})", '"{}"', "x={}"])
def test_what_looks_like_a_key_is_taken_out_of_texts(secret: str, around: str) -> None:
    cleaned = redacted(around.format(secret))
    assert secret not in cleaned
    assert REDACTED in cleaned


@pytest.mark.parametrize(("text", "secret"), IN_TEXTS)
def test_what_is_called_a_secret_is_taken_out_of_texts(text: str, secret: str) -> None:
    assert secret not in redacted(text)


@pytest.mark.parametrize("changed", [str, str.upper, lambda text: text.replace("k", "\u212a")])
def test_what_is_written_is_searched_wherever_there_may_be_a_secret(changed: Callable[[str], str]) -> None:
    for text in (*SECRETS, *(text for text, _ in IN_TEXTS), *ORDINARY):
        value = [changed(text), {"key": changed(text)}]
        assert json.loads(PayloadWriter()(value)) == redacted(value)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "API-Key",
        "apikey",
        "Authorization",
        "password",
        "passwd",
        "client_secret",
        "token",
        "auth_token",
        "accessToken",
        "refresh_token",
        "Cookie",
        "set-cookie",
        "private_key",
        "credentials",
        "x-api-key",
        "secret",
    ],
)
def test_a_field_that_is_called_a_secret_is_taken_out_whatever_it_holds(name: str) -> None:
    assert redacted({name: "ab"}) == {name: REDACTED}
    assert redacted([{"a": {name: 1234}}]) == [{"a": {name: REDACTED}}]
    assert redacted({name: ["ab", "cd"]}) == {name: [REDACTED, REDACTED]}
    assert redacted({name: None}) == {name: None}


@pytest.mark.parametrize("name", ["input_tokens", "max_tokens", "tokens", "keyboard", "monkey", "key", "author"])
def test_a_field_of_another_name_stays(name: str) -> None:
    assert redacted({name: "ab"}) == {name: "ab"}


def test_known_secrets_are_taken_out_as_json_too() -> None:
    redactor = Redactor(['quo"ted\\secret', "höher-geheim", "part", "part-and-more", "abc"])
    text = json.dumps(['quo"ted\\secret', "höher-geheim", "a part-and-more b", "abc"], ensure_ascii=False).encode()
    assert json.loads(redactor.without_known(text)) == [REDACTED, REDACTED, f"a {REDACTED} b", "abc"]


def written_in_other_ways(text: str) -> list[str]:
    as_json = [json.dumps(text), json.dumps(text, ensure_ascii=False)]
    return [repr(text), *as_json, *map(json.dumps, as_json), quote(text), quote(text, safe=""), quote_plus(text)]


@pytest.mark.parametrize("secret", ['quo"ted\\secret', "höher geheim", "a/b+c=d e", "two\nlines", "it's"])
def test_known_secrets_are_taken_out_however_a_text_spells_them(secret: str) -> None:
    payload = PayloadWriter([f" {secret}\n"])
    for text in (secret, *written_in_other_ways(secret)):
        said = json.loads(payload({"arguments": f"<{text}>", f"<{text}>": 1}))
        for each in (said["arguments"], *(said.keys() - {"arguments"})):
            assert re.sub(r"[\"'\\]", "", each) == f"<{REDACTED}>"


@pytest.mark.parametrize("secret", SECRETS[:10], ids=lambda text: text[:12])
def test_the_names_of_fields_are_searched_too(secret: str) -> None:
    assert json.loads(PayloadWriter()({"of": {secret: 1}})) == {"of": {REDACTED: 1}}


@pytest.mark.parametrize("name", ["x" * 1_000_000, "x " * 500_000])
def test_a_name_is_kept_in_bounded_length(name: str) -> None:
    payload = PayloadWriter()
    assert len(payload.name(name)) < 500
    assert b"more characters" in payload.name(name)


def test_names_are_searched_and_those_that_are_kept_have_a_bound() -> None:
    payload = PayloadWriter(["known-secret"])
    assert [payload.name(each) for each in ("look", "known-secret", SECRETS[0], None, "look")] == [
        b'"look"',
        *[f'"{REDACTED}"'.encode()] * 2,
        b"null",
        b'"look"',
    ]
    tracemalloc.start()
    try:
        for number in range(5_000):
            payload.name(f"{number:0300}")
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()


def test_values_of_the_environment_that_are_called_secrets_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_OWN_TOKEN", "vvvvvvvvvv")
    monkeypatch.setenv("MY_OWN_KEY", "short")
    monkeypatch.setenv("MY_OWN_PATH", "wwwwwwwwwwww")
    known = secrets_of_environment()
    assert "vvvvvvvvvv" in known
    assert not {"short", "wwwwwwwwwwww"} & set(known)


@pytest.mark.parametrize(
    "piece",
    [
        *("key", "a", "eyJ-", "a.", "bearer ", "token:", "api_key", "sk-", "-----BEGIN PRIVATE KEY-----", "://"),
        *("http://a:", "secret\\", "passwd  ", "?key", "&a", "sig", "eyJaaaaaaaaaa."),
    ],
)
def test_the_time_it_takes_grows_with_the_length_of_a_text_and_no_faster(piece: str) -> None:
    def seconds(length: int) -> float:
        text = f"key {piece * (length // len(piece))} key"
        began = time.thread_time()  # a busy machine adds nothing to it
        redacted(text)
        return time.thread_time() - began

    few = min(seconds(20_000) for _ in range(3))
    assert min(seconds(160_000) for _ in range(3)) < 8 * 4 * few + 0.05


# ---- how much is held


def test_long_texts_are_cut_and_the_cut_is_marked() -> None:
    cut = capped("x" * 5000, 1000, 10_000)
    assert cut == "x" * 1000 + "… [cut: 4000 more characters]"
    assert capped("x" * 1000, 1000, 10_000) == "x" * 1000


@pytest.mark.parametrize("longest", [1, 10, 99])
def test_a_length_is_held_however_short_it_is(longest: int) -> None:
    assert json.loads(PayloadWriter(max_text=longest)("x" * 200)).startswith("x" * longest + "… [cut: ")


def test_a_text_is_cut_between_two_words_so_that_no_half_of_a_key_is_left() -> None:
    text = "word " * 190 + "sk-" + "abcdefgh" * 10
    cut = capped(text, 960, 10_000)
    assert "sk-" not in cut
    assert "more characters]" in cut


@pytest.mark.parametrize(
    "value", [["x" * 90] * 10_000, {f"f{n}": "x" * 90 for n in range(10_000)}, [[["y"] * 99] * 99]]
)
def test_long_lists_and_objects_are_cut_too(value: Any) -> None:
    text = json.dumps(capped(value, 1000, 5000))
    assert len(text) < 15_000
    assert "[cut: " in text
