"""No secret that we were given leaves in anything we make."""

from __future__ import annotations

import base64
import gc
import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any
from urllib.parse import quote

import httpx2
import openai
import pytest
from pydantic import SecretStr

from fractal import AgentResult, BaseAgent, InvalidArguments, ModelError, OpenAIModel, RunError
from fractal.models._replies.reading import reply_of
from fractal.models._replies.reported import status_error
from fractal.models._secrets import Secrets
from fractal.testing import Endpoint, answers
from tests.clients import ASYNC, BLOCKING, BOUND, OWN, THREADED, Models
from tests.without_uvloop import anyio_backend  # noqa: F401

KEY = "sk-SECRET/0123+456789="
"""With what is written in other ways in JSON, URLs and pages."""

FORMS = {KEY, quote(KEY, safe=""), json.dumps(KEY)[1:-1], KEY.replace("/", "\\/")}

StartEndpoint = Callable[..., Endpoint]


@pytest.fixture
def log() -> Iterator[StringIO]:
    """What the logger `fractal` says."""
    text, logger = StringIO(), logging.getLogger("fractal")
    handler, level = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield text
    logger.removeHandler(handler)
    logger.setLevel(level)


def family(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and all that it came from, whether it is shown or not."""
    if error is None:
        return
    yield error
    yield from family(error.__cause__)
    yield from family(error.__context__)


def everything_said(result: AgentResult, told: list[Any], log: StringIO) -> dict[str, str]:
    """All texts that a failure leaves."""
    error = result.exception
    assert isinstance(error, RunError)
    texts = {
        "the error": str(error),
        "its repr": repr(error),
        "the traceback": "".join(traceback.format_exception(error)),
        "attributes": repr({name: value for name, value in vars(error).items() if name != "result"}),
        "a pickle": repr(pickle.dumps(error)),
        "the result": f"{result} {result!r} {result.model_dump_json()}",
        "the events": " ".join(f"{event} {event!r}" for event in told),
        "the log": log.getvalue(),
    }
    for number, each in enumerate(family(error)):
        texts[f"{number}: {type(each).__name__}"] = f"{each} {each!r} {each.args} {getattr(each, '__notes__', '')}"
        request = getattr(each, "_request", None) or getattr(each, "response", None)
        assert request is None, "it has the request, with the key in it"
    return texts


async def failed(model: Any, log: StringIO, *, streamed: bool = False) -> dict[str, str]:
    told: list[Any] = []
    agent = BaseAgent("A", "a", client=model, observers=[told.append])
    if streamed:
        async with agent.stream("go", max_retries=0, timeout=10) as stream:
            result = await stream.result()
    else:
        result = await agent.run("go", max_retries=0, timeout=10)
    assert not result.success
    return everything_said(result, told, log)


def assert_shown_nowhere(texts: dict[str, str], *secrets: str) -> None:
    found = [(place, secret) for place, text in texts.items() for secret in secrets if secret in text]
    assert found == [], {place: texts[place][:2000] for place, _ in found}


def repeating(secret: str) -> dict[str, Any]:
    """Answers that repeat a secret, wherever an endpoint can."""
    return {
        "401": answers.failure(401, f"Incorrect API key provided: {secret}", code=f"bad_{secret}"),
        "a field": answers.raw(json.dumps({"error": {"message": "no", "param": secret}}), status=400),
        "429": answers.failure(429, f"key {secret} is slow"),
        "500 in text": answers.raw(f"cannot use {secret}", status=500),
        "500 in JSON": answers.raw(json.dumps({"hint": secret}), status=500, content_type="application/json"),
        "500 with a slash": answers.raw(json.dumps({"hint": secret}).replace("/", "\\/"), status=500),
        "an error in a 200": answers.raw(json.dumps({"error": {"message": f"bad key {secret}"}})),
        "JSON": answers.raw(json.dumps({"hint": f"bad key {secret}"}), content_type="application/json"),
        "a page": answers.raw(f"<html>your key {secret} is bad</html>"),
        "a link": answers.raw(f"see https://help.invalid/?key={quote(secret, safe='')}", status=403),
        "a header": answers.failure(400, "no", headers={"X-Request-Id": secret}),
    }


ANSWERS = list(repeating(KEY))


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_key_that_an_endpoint_repeats(
    name: str, streamed: bool, models: Models, endpoint: StartEndpoint, log: StringIO
):
    one = endpoint(repeating(KEY)[name])
    assert_shown_nowhere(await failed(models(one.url, KEY), log, streamed=streamed), *FORMS)


@pytest.mark.parametrize("name", ["401", "500 in text", "JSON"])
async def test_a_key_that_a_function_makes(name: str, models: Models, endpoint: StartEndpoint, log: StringIO):
    async def make() -> str:
        return KEY

    one = endpoint(repeating(KEY)[name])
    model = models(one.url, make if models.kind in (ASYNC, BOUND) else lambda: KEY)
    for _ in range(2):
        assert_shown_nowhere(await failed(model, log), *FORMS)


@pytest.mark.parametrize("kind", ["AsyncAzureOpenAI", "AzureOpenAI"])
@pytest.mark.parametrize("way", ["azure_ad_token", "azure_ad_token_provider"])
async def test_a_token_of_entra(kind: str, way: str, endpoint: StartEndpoint, log: StringIO):
    one = endpoint(repeating(KEY)["401"])
    token = KEY if way == "azure_ad_token" else lambda: KEY
    client = getattr(openai, kind)(base_url=one.url, api_version="2026-01-01", **{way: token})
    assert_shown_nowhere(await failed(client, log), *FORMS)
    if kind == "AzureOpenAI":
        client.close()


@pytest.mark.parametrize("header", ["X-Token", "Cookie", "Authorization", "X-Gateway", "Proxy-Authorization"])
async def test_a_secret_in_a_header_of_the_clients(header: str, endpoint: StartEndpoint, log: StringIO):
    value = f"session={KEY}; a=b" if header == "Cookie" else f"Bearer {KEY}" if "Auth" in header else KEY
    for kind in (ASYNC, BLOCKING, BOUND, THREADED):
        one = endpoint(repeating(KEY)["401"])
        models = Models(kind)
        texts = await failed(models(one.url, "sk-other", default_headers={header: value}), log)
        assert_shown_nowhere(texts, *FORMS)
        await models.aclose()


async def test_a_secret_in_a_header_of_the_users_http_client(endpoint: StartEndpoint, log: StringIO):
    one = endpoint(repeating(KEY)["401"])
    async with httpx2.AsyncClient(headers={"X-Token": KEY}) as own:
        client = openai.AsyncOpenAI(base_url=one.url, api_key="sk-other", http_client=own)
        assert_shown_nowhere(await failed(client, log), *FORMS)


async def test_a_secret_in_a_query(models: Models, endpoint: StartEndpoint, log: StringIO):
    one = endpoint(repeating(KEY)["401"])
    options = {} if models.kind == OWN else {"default_query": {"key": KEY}}
    url = f"{one.url}?key={quote(KEY, safe='')}" if models.kind == OWN else one.url
    assert_shown_nowhere(await failed(models(url, "sk-other", **options), log), *FORMS)
    assert one.requests[0].query == f"key={quote(KEY, safe='')}"


async def test_a_password_before_the_host(endpoint: StartEndpoint, log: StringIO):
    for kind in (OWN, ASYNC):
        one = endpoint(answers.failure(401, f"no {KEY} {base64.b64encode(f'ada:{KEY}'.encode()).decode()}"))
        url = one.url.replace("//", f"//ada:{quote(KEY, safe='')}@")
        texts = await failed(Models(kind)(url, None if kind == OWN else "sk-other"), log)
        assert_shown_nowhere(texts, *FORMS, base64.b64encode(f"ada:{KEY}".encode()).decode())
        signed = one.requests[0].headers["authorization"]
        assert signed == "Basic " + base64.b64encode(f"ada:{KEY}".encode()).decode()


async def test_a_password_of_a_proxy(models: Models, endpoint: StartEndpoint, log: StringIO, monkeypatch: Any):
    token = base64.b64encode(f"ada:{KEY}".encode()).decode()
    one = endpoint(answers.failure(407, f"no {KEY} {token}"))
    monkeypatch.setenv("http_proxy", one.url.removesuffix("/v1").replace("//", f"//ada:{quote(KEY, safe='')}@"))
    texts = await failed(models("http://elsewhere.invalid/v1", "sk-other"), log)
    if models.kind in (OWN, ASYNC, BLOCKING):
        assert one.requests[0].headers["proxy-authorization"] == f"Basic {token}"
        assert_shown_nowhere(texts, *FORMS, token)


@pytest.mark.parametrize(
    "proxy",
    [
        "ht!tp://ada:{}@host:1",
        "http://ada:{}@127.0.0.1:1",
        "http://ada:{}@host:99999",
        "socks4://ada:{}@h",
        "http://:{}@",
    ],
)
async def test_a_password_of_a_proxy_that_cannot_be_asked(proxy: str, log: StringIO, monkeypatch: Any):
    for kind in (OWN, ASYNC):
        model = Models(kind)("http://elsewhere.invalid/v1", "sk-other")
        monkeypatch.setenv("http_proxy", proxy.format("hunter22"))
        assert_shown_nowhere(await failed(model, log), "hunter22")
        monkeypatch.delenv("http_proxy")


@pytest.mark.parametrize("stray", ["\n", "\r\n", "\x00", "’", "\nX-More: 1", "\u2028"], ids=ascii)
async def test_a_key_that_no_header_can_carry(stray: str, models: Models, endpoint: StartEndpoint, log: StringIO):
    one = endpoint("hello")
    if models.kind == OWN and not stray.strip():
        pytest.skip("a line end is no part of the key")
    texts = await failed(models(one.url, KEY + stray), log)
    assert_shown_nowhere(texts, *FORMS)
    assert one.requests == []


async def test_a_key_that_no_header_can_carry_and_a_function_makes(endpoint: StartEndpoint, log: StringIO):
    one = endpoint("hello")

    async def make() -> str:
        return KEY + "’"

    for client in (openai.AsyncOpenAI(base_url=one.url, api_key=make), OpenAIModel(base_url=one.url, api_key=make)):
        assert_shown_nowhere(await failed(client, log), *FORMS)


@pytest.mark.parametrize(
    "url",
    [
        "htps://ada:hunter22@host/v1", "http://ada:hunter22@/v1", "ada:hunter22@host/v1", "http://ada:hunter22@host:99999/v1",
        "ht!tp://ada:hunter22@host", "https://host/v1?key=hunter22#x", "host/v1?key=hunter22", "http://ada:hunter22@[::1/v1",
        "//ada:hunter22@host", "http://ada:hunter22@host:0/v1", "file:///x?hunter22",
    ],
)  # fmt: skip
async def test_a_url_that_cannot_be_used(url: str, log: StringIO):
    assert_shown_nowhere(await failed(OpenAIModel(base_url=url, api_key=None), log), "hunter22")


def test_a_value_that_is_refused_is_named_by_its_kind():
    secret = "sk-secret-0123456789"
    for make in (
        lambda: BaseAgent("A", "a", client=secret),
        lambda: OpenAIModel(secret),
        lambda: OpenAIModel({"api_key": secret}),
        lambda: OpenAIModel(api_key=[secret]),  # type: ignore[arg-type]
        lambda: OpenAIModel(base_url={"url": f"http://{secret}@h"}),  # type: ignore[arg-type]
        lambda: OpenAIModel(openai.AsyncOpenAI(api_key=secret), base_url=f"http://ada:{secret}@h", api_key=secret),
    ):
        with pytest.raises(InvalidArguments) as caught:
            make()
        assert secret not in f"{caught.value} {caught.value!r}"


def test_no_repr_of_a_model_or_agent_shows_a_key():
    for model in (
        OpenAIModel(base_url="http://h", api_key=KEY),
        OpenAIModel(base_url="http://h", api_key=SecretStr(KEY)),
        OpenAIModel(openai.AsyncOpenAI(api_key=KEY)),
    ):
        agent = BaseAgent("A", "a", client=model)
        assert KEY not in f"{model} {model!r} {agent} {agent!r}"
    gc.collect()


async def test_an_error_of_the_sdk_that_an_object_raises_shows_no_key(log: StringIO):
    request = httpx2.Request("POST", "http://h/v1", headers={"Authorization": f"Bearer {KEY}"})
    answer = httpx2.Response(401, request=request, json={"error": {"message": f"bad {KEY}"}})

    class Double:
        class chat:
            class completions:
                @staticmethod
                async def create(**_: Any) -> Any:
                    raise openai.AuthenticationError(f"bad {KEY}", response=answer, body={"message": f"bad {KEY}"})

    assert_shown_nowhere(await failed(Double(), log), *FORMS)


async def test_a_model_says_what_went_wrong_all_the_same(models: Models, endpoint: StartEndpoint, log: StringIO):
    one = endpoint(answers.failure(401, f"Incorrect API key provided: {KEY}. Look at your account."))
    told = (await failed(models(one.url, KEY), log))["the error"]
    assert told == "HTTP 401: Incorrect API key provided: [key]. Look at your account."


WRITTEN = {
    "with small letters": quote(KEY, safe="").replace("%2F", "%2f").replace("%2B", "%2b").replace("%3D", "%3d"),
    "in a page": f"<p>{KEY.replace('-', '&#45;').replace('/', '&#x2f;')}</p>",
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_key_is_known_however_it_is_written(form: str):
    said = str(status_error(401, {}, f"wrong key {WRITTEN[form]}".encode(), Secrets(KEY)))
    assert said == "HTTP 401: wrong key [key]"


@pytest.mark.parametrize("key", [KEY, "eyJ" + "SECRET-token_" * 40])
def test_no_half_of_a_key_is_left_where_a_text_is_cut(key: str):
    secrets, halves = Secrets(key), (key[:6], key[-6:])
    for size in range(0, 400, 3):
        text = "x" * size + key + "y" * 300
        for answer in (text, [text], {"a": text}, {text: 1}, {"a": {"b": [text]}}):
            with pytest.raises(ModelError) as caught:
                reply_of(answer, secrets=secrets)
            assert not any(half in str(caught.value) for half in halves)
    for size in range(19_900, 20_001, 7):
        page = f"<{'p' * (size - 2)}>{key}".encode()
        for read in (page, page[:20_000]):  # as much as is read of an error
            assert key[:6] not in str(status_error(500, {}, read, secrets))
    error = status_error(400, {}, json.dumps({"error": {"message": "no", "code": key * 20}}).encode(), secrets)
    assert not any(half in str(error.code) for half in halves)
