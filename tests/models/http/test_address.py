"""What people pass as `base_url` and `api_key`, and what becomes of it."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from pydantic import AnyUrl, HttpUrl, SecretBytes, SecretStr

from fractal import BaseAgent, ConnectionFailed, InvalidArguments, MissingCredentials, OpenAIModel
from fractal.models._http.address import address_of, plain_key, plain_url
from fractal.models._http.pool import machine_tls
from fractal.testing import Endpoint
from fractal.testing.endpoint import RecordedRequest
from tests.without_uvloop import anyio_backend  # noqa: F401

AZURE = {"api_key": "k", "base_url": "http://h", "api_version": "1"}


class Text(str):
    """Text that shows itself in another way."""

    def __str__(self) -> str:
        return "shown"


class Named(StrEnum):
    KEY = "sk-test"


async def make_async() -> str:
    return "sk-test"


class Maker:
    async def __call__(self) -> SecretStr:
        return SecretStr("sk-test")


async def asked(key: Any = "sk-test", change_url: Any = str) -> RecordedRequest:
    with Endpoint("hello") as endpoint:
        model = OpenAIModel(base_url=change_url(endpoint.url), api_key=key)
        result = await BaseAgent("A", "a", client=model).run("go", max_retries=0)
        assert result.content == "hello", result.error
        return endpoint.requests[0]


KEYS = [
    "sk-test", "sk-test\n", b"sk-test", bytearray(b"sk-test\r\n"), Text("sk-test"), Named.KEY, SecretStr("sk-test"),
    SecretBytes(b"sk-test"), lambda: "sk-test", lambda: SecretStr("sk-test"), make_async, functools.partial(make_async),
    lambda: make_async(), Maker(),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
async def test_a_key_may_be_text_in_any_form_or_a_function(key: Any):
    assert (await asked(key)).headers["authorization"] == "Bearer sk-test"


async def test_a_function_is_asked_for_its_key_at_each_request():
    keys = iter(("sk-1", "sk-2"))
    with Endpoint("hello") as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key=lambda: next(keys)))
        for _ in range(2):
            assert (await agent.run("go", max_retries=0)).success
        assert [each.headers["authorization"] for each in endpoint.requests] == ["Bearer sk-1", "Bearer sk-2"]


@pytest.mark.parametrize("made", [None, "", b"", 5, ["sk-test"]], ids=repr)
async def test_a_function_that_returns_no_key_signs_nothing(made: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with Endpoint("hello") as endpoint:
        agent = BaseAgent("A", "a", client=OpenAIModel(base_url=endpoint.url, api_key=lambda: made))
        result = await agent.run("go", max_retries=0)
        assert isinstance(result.exception, MissingCredentials), result.error
        assert endpoint.requests == []


URLS = [
    str, str.encode, lambda url: url + "/", lambda url: f" {url}\n", Text, httpx2.URL, HttpUrl, AnyUrl, urlsplit,
    SecretStr, lambda url: url.replace("http://", "HTTP://"),
]  # fmt: skip


@pytest.mark.parametrize("change", URLS, ids=range(len(URLS)))
async def test_a_url_may_be_text_in_any_form_or_that_of_a_library(change: Any):
    assert (await asked(change_url=change)).path == "/v1/chat/completions"


async def test_the_query_of_a_url_is_sent_with_each_request():
    request = await asked(change_url=lambda url: f"{url}/?a=1&b=x%20y")
    assert (request.path, request.query) == ("/v1/chat/completions", "a=1&b=x%20y")


@pytest.mark.parametrize(
    "value", [5, 5.0, ["k"], {"k": 1}, object(), str, True], ids=lambda value: type(value).__name__
)
def test_what_can_be_no_key_is_refused_at_once_by_its_kind(value: Any):
    with pytest.raises(InvalidArguments, match=f"api_key is a {type(value).__name__}"):
        OpenAIModel(api_key=value)


@pytest.mark.parametrize(
    "value", [5, ["http://h"], object(), lambda: "http://h"], ids=lambda value: type(value).__name__
)
def test_what_can_be_no_url_is_refused_at_once_by_its_kind(value: Any):
    with pytest.raises(InvalidArguments, match=f"base_url is a {type(value).__name__}"):
        OpenAIModel(base_url=value)


@pytest.mark.parametrize(
    "options", [{"base_url": "http://h/v1"}, {"api_key": "k"}, {"base_url": "http://h", "api_key": "k"}]
)
def test_a_client_comes_with_no_url_and_key_beside_it(options: dict[str, Any]):
    for client in (
        openai.AsyncOpenAI(api_key="k"),
        openai.AsyncAzureOpenAI(**AZURE),
    ):
        with pytest.raises(InvalidArguments, match=next(iter(options))):
            OpenAIModel(client, **options)


def refusal(url: str) -> str:
    with pytest.raises(ConnectionFailed) as caught:
        address_of(url, "k", None, None, is_key_given=False)
    assert not caught.value.retryable
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "put http:// or https:// before it, as in 'http://localhost:8000/v1'"),
        ("127.0.0.1:8000", "as in 'http://127.0.0.1:8000'"),
        ("api.openai.com/v1", "as in 'http://api.openai.com/v1'"),
        ("htps://host", "put http:// or https:// before it"),
        ("ftp://host/v1", "put http:// or https:// before it"),
        ("http://", "names no host"),
        ("http:///v1", "names no host"),
        ("http://host:99999", "names no host, or a port that nobody can have"),
        ("http://host:0", "a port that nobody can have"),
        ("http://host:a", "a port that nobody can have"),
        ("http://[::1", "names no host"),
        ("http://host/v1#x", "what comes after # is never sent"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_what_to_do(url: str, words: str):
    assert words in refusal(url)


def test_a_user_and_password_sign_a_request_unless_a_key_does():
    address = address_of("http://ada:p%40ss@host:1/v1?a=1", None, None, None, is_key_given=False)
    assert address.url == "http://host:1/v1/chat/completions?a=1"
    assert address.headers["Authorization"] == "Basic YWRhOnBAc3M="
    of_environment = address_of("http://ada:p%40ss@host:1/v1", "sk-env", None, None, is_key_given=False)
    assert of_environment.headers == address.headers
    with pytest.raises(ConnectionFailed, match="one request cannot be signed by both"):
        address_of("http://ada:p%40ss@host:1/v1", "sk-test", None, None, is_key_given=True)


def test_nothing_is_given_by_none():
    assert plain_key(None) is None
    assert plain_url(None) is None


@pytest.mark.parametrize("key", ["", b"", "  ", SecretStr("")], ids=range(4))
async def test_with_an_empty_key_that_of_the_environment_is_not_sent(key: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    assert "authorization" not in (await asked(key)).headers
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    result = await BaseAgent("A", "a", client=OpenAIModel(api_key=key)).run("go", max_retries=0)
    assert type(result.exception) is MissingCredentials


@pytest.mark.parametrize("url", ["", "  ", b"", SecretStr("")], ids=range(4))
def test_an_empty_url_sends_no_conversation_to_somebody_else(url: Any):
    with pytest.raises(InvalidArguments, match="base_url is empty"):
        OpenAIModel(base_url=url, api_key="k")


@pytest.mark.parametrize("model", [".", "..", "..."])
async def test_a_deployment_of_azure_that_would_go_up_a_level_is_refused(model: str):
    blocking = openai.AzureOpenAI(**AZURE)
    for client in (openai.AsyncAzureOpenAI(**AZURE), blocking):
        agent = BaseAgent("A", "a", model, client=client)
        with pytest.raises(InvalidArguments, match="Azure"):
            await agent.run("go", max_retries=0)
    blocking.close()


async def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    (tmp_path / "no.pem").write_text("no certificate")
    for path in (tmp_path / "missing.pem", tmp_path / "no.pem"):
        machine_tls.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        result = await BaseAgent("A", "a", client=OpenAIModel(base_url="https://127.0.0.1:1/v1", api_key="k")).run("go")
        assert isinstance(result.exception, ConnectionFailed), repr(result.exception)
        assert "SSL_CERT_FILE" in str(result.error)
        assert result.usage.requests == 1
    machine_tls.cache_clear()
