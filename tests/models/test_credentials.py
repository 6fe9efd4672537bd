"""Nothing is shared between credentials, and what a client says now is what is used."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from fractal import AgentResult, BaseAgent, FallbackModel, OpenAIModel, RateLimited
from fractal.testing import Endpoint, answers
from tests.clients import ASYNC, BOUND, OWN, Models
from tests.raw_server import Wire, body_of, http, raw_server, said
from tests.without_uvloop import anyio_backend  # noqa: F401

StartEndpoint = Callable[..., Endpoint]


def header(request: bytes, name: str) -> str | None:
    """A header of a request, or None."""
    for line in request.decode("latin-1").partition("\r\n\r\n")[0].split("\r\n")[1:]:
        found, _, value = line.partition(": ")
        if found.lower() == name:
            return value
    return None


async def asked(model: Any, text: str = "go", *, streamed: bool = False) -> AgentResult:
    agent = BaseAgent("A", "a", client=model)
    if not streamed:
        return await agent.run(text, max_retries=0, timeout=20)
    async with agent.stream(text, max_retries=0, timeout=20) as stream:
        return await stream.result()


# ---- cookies


def setting_a_cookie(*cookies: bytes) -> Callable[[Wire], None]:
    def talk(wire: Wire) -> None:
        while wire.request():
            head, _, body = said("hello").partition(b"\r\n\r\n")
            wire.send(b"\r\n".join([head, *(b"Set-Cookie: " + cookie for cookie in cookies), b"", body]))

    return talk


COOKIES = [b"session=alice; Path=/; HttpOnly", b"a=1; Max-Age=1000", b"b=2; Domain=127.0.0.1"]
ODD = [b"\xff=\xfe; Path=/", b"", b"=", b";;;", b"a\tb", b"x" * 5000, b"session=\x01\x02", b'"=", ",']


@pytest.mark.parametrize("kind", [OWN, ASYNC, "OpenAI"])
async def test_no_cookie_goes_out_with_any_request(kind: str):
    with raw_server(setting_a_cookie(*COOKIES)) as server:
        made = [Models(kind), Models(OWN), Models(ASYNC)]
        for models, key in zip(made, ("sk-alice", "sk-bob", "sk-carol"), strict=True):
            for _ in range(2):
                assert (await asked(models(server.url, key))).content == "hello"
        assert [header(request, "cookie") for request in server.requests] == [None] * 6
        for models in made:
            await models.aclose()


@pytest.mark.parametrize("cookie", ODD, ids=ascii)
async def test_an_odd_cookie_harms_nobody(cookie: bytes, models: Models):
    with raw_server(setting_a_cookie(cookie)) as server:
        for key in ("sk-alice", "sk-bob"):
            assert (await asked(models(server.url, key))).content == "hello"
        if models.kind != BOUND and "http_client" not in models.kind:
            assert [header(request, "cookie") for request in server.requests] == [None, None]


async def test_the_cookies_of_a_users_own_http_client_are_his(endpoint: StartEndpoint):
    one = endpoint("hello")
    async with httpx2.AsyncClient(cookies={"session": "mine"}, headers={"X-Mine": "yes"}) as own:
        client = openai.AsyncOpenAI(base_url=one.url, api_key="k", http_client=own)
        assert (await asked(client)).content == "hello"
    assert (one.requests[0].headers["cookie"], one.requests[0].headers["x-mine"]) == ("session=mine", "yes")


async def test_no_cookie_goes_through_a_proxy_twice(monkeypatch: pytest.MonkeyPatch):
    with raw_server(setting_a_cookie(*COOKIES)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        for kind in (OWN, ASYNC):
            for key in ("sk-alice", "sk-bob"):
                model = Models(kind)("http://elsewhere.invalid/v1", key)
                assert (await asked(model)).content == "hello"
        assert [header(request, "cookie") for request in proxy.requests] == [None] * 4


# ---- connections


async def test_a_connection_serves_one_credential(endpoint: StartEndpoint):
    one = endpoint("hello")
    for key, again in itertools.product(("sk-alice", "sk-bob"), range(3)):
        for kind in (OWN, ASYNC):
            assert (await asked(Models(kind)(one.url, key))).success, again
    assert one.connections_opened == 2


@pytest.mark.parametrize(
    "options",
    [{"default_headers": {"X-Tenant-Token": "b"}}, {"organization": "b"}, {"default_query": {"api-key": "bbbb"}}],
    ids=lambda options: next(iter(options)),
)
async def test_what_a_request_is_signed_with_is_more_than_its_key(options: dict[str, Any], endpoint: StartEndpoint):
    one = endpoint("hello")
    for more in ({}, options, {}, options):
        assert (await asked(openai.AsyncOpenAI(base_url=one.url, api_key="sk-same", **more))).success
    assert one.connections_opened == 2


async def test_what_an_endpoint_says_unasked_reaches_nobody_else():
    def talk(wire: Wire) -> None:
        while request := wire.request():
            key = str(header(request, "authorization"))
            wire.send(said(key))
            wire.said_all.wait(0.05)
            wire.send(said(f"{key} once more"))

    with raw_server(talk) as server:
        agents = [
            BaseAgent("A", "a", client=OpenAIModel(base_url=server.url, api_key=key)) for key in ("sk-alice", "sk-bob")
        ]
        for agent, key in [*zip(agents, ("sk-alice", "sk-bob"), strict=True)] * 10:
            result = await agent.run("go", max_retries=3)
            assert str(result.content).startswith(f"Bearer {key}")


# ---- settings that are assigned


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_changed_client_is_used_as_it_is_now(streamed: bool, models: Models, endpoint: StartEndpoint):
    if models.kind == OWN:
        pytest.skip("it has no client")
    one, two = endpoint("one"), endpoint("two")
    client = models.client(base_url=one.url, api_key="sk-alice", organization="org-a", project="proj-a")
    model = OpenAIModel(client)
    assert (await asked(model, streamed=streamed)).content == "one"
    client.api_key = "sk-bob"
    client.organization, client.project = "org-b", "proj-b"
    client._custom_headers = {"X-New": "yes"}
    client._custom_query = {"v": "7"}
    assert (await asked(model, streamed=streamed)).content == "one"
    last = one.requests[-1]
    assert last.headers["authorization"] == "Bearer sk-bob"
    assert (last.headers["openai-organization"], last.headers["openai-project"]) == ("org-b", "proj-b")
    assert (last.headers["x-new"], last.query) == ("yes", "v=7")
    client._custom_headers["X-New"] = "changed in place"
    client.base_url = two.url
    assert (await asked(model, streamed=streamed)).content == "two"
    assert two.requests[-1].headers["x-new"] == "changed in place"


async def test_a_changed_timeout_is_used(models: Models, endpoint: StartEndpoint):
    if models.kind == OWN:
        pytest.skip("it has no client")
    one = endpoint(["hello", answers.hang()])
    client = models.client(base_url=one.url, api_key="k")
    model = OpenAIModel(client)
    assert (await asked(model)).content == "hello"
    client.timeout = 0.1
    result = await asked(model)
    assert "did not answer in time" in str(result.error), result.error


@pytest.mark.parametrize("kind", ["AsyncAzureOpenAI", "AzureOpenAI"])
async def test_a_changed_client_of_azure_is_used_as_it_is_now(kind: str, endpoint: StartEndpoint):
    one = endpoint("hello")
    client = getattr(openai, kind)(base_url=f"{one.url}/openai", api_key="sk-alice", api_version="2026-01-01")
    model = OpenAIModel(client)
    assert (await asked(model)).success
    client.api_key = "sk-bob"
    assert (await asked(model)).success
    assert one.requests[-1].headers["api-key"] == "sk-bob"
    client._azure_ad_token = "token-0123"
    assert (await asked(model)).success
    assert one.requests[-1].headers["authorization"] == "Bearer token-0123"
    if kind == "AzureOpenAI":
        client.close()


async def test_a_changed_key_is_used_by_the_members_of_a_combination(endpoint: StartEndpoint):
    one = endpoint([answers.failure(500), "hello", answers.failure(500), "hello"])
    first = openai.AsyncOpenAI(base_url=one.url, api_key="sk-alice")
    second = openai.OpenAI(base_url=one.url, api_key="sk-alice")
    agent = BaseAgent("A", "a", client=FallbackModel(first, second))
    for key in ("sk-alice", "sk-bob"):
        first.api_key = second.api_key = key
        assert (await agent.run("go", max_retries=0)).content == "hello"
        assert [each.headers["authorization"] for each in one.requests[-2:]] == [f"Bearer {key}"] * 2
    second.close()


async def test_a_key_of_a_function_is_asked_for_each_time(models: Models, endpoint: StartEndpoint):
    one = endpoint("hello")
    keys = iter(("sk-1", "sk-2", "sk-3"))

    async def make_async() -> str:
        return next(keys)

    is_async = models.kind in (ASYNC, BOUND)
    model = models(one.url, make_async if is_async else lambda: next(keys))
    for _ in range(3):
        assert (await asked(model)).success
    assert [each.headers["authorization"] for each in one.requests] == ["Bearer sk-1", "Bearer sk-2", "Bearer sk-3"]


class Own(openai.AsyncOpenAI):
    """A client with something of the user's, made in its own way."""

    def __init__(self, tenant: str, **options: Any) -> None:
        super().__init__(**options)
        self.tenant = tenant

    @property
    def default_headers(self) -> Any:
        return {**super().default_headers, "X-Tenant": self.tenant}


async def test_a_client_of_a_class_of_the_users_own_is_used_as_it_is(endpoint: StartEndpoint):
    one = endpoint("hello")
    client = Own("a", base_url=one.url, api_key="k")
    model = OpenAIModel(client)
    assert (await asked(model)).success
    client.tenant = "b"
    assert (await asked(model)).success
    assert [each.headers["x-tenant"] for each in one.requests] == ["a", "b"]


async def test_hooks_and_auth_of_a_users_own_http_client_are_called(endpoint: StartEndpoint):
    one = endpoint("hello")
    seen: list[str] = []

    async def look(response: httpx2.Response) -> None:
        seen.append(body_of(http(await response.aread())).decode())

    async with httpx2.AsyncClient(event_hooks={"response": [look]}, auth=("user", "password")) as own:
        client = openai.AsyncOpenAI(base_url=one.url, api_key="k", http_client=own)
        assert (await asked(client)).content == "hello"
    assert one.requests[0].headers["authorization"].startswith("Basic ")
    assert '"hello"' in seen[0]


def test_a_transport_of_a_users_own_is_used(backend: str):
    import anyio

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=body_of(said("from a mock")), headers={"Content-Type": "application/json"})

    async def work() -> None:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as own:
            client = openai.AsyncOpenAI(base_url="http://nowhere.invalid/v1", api_key="k", http_client=own)
            assert (await asked(client)).content == "from a mock"

    anyio.run(work, backend=backend)


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_hook_of_a_users_own_http_client_may_look_at_the_status(is_read: bool, endpoint: StartEndpoint):
    one = endpoint(answers.failure(429, "slow down"))

    async def look(response: httpx2.Response) -> None:
        if is_read:
            await response.aread()
        response.raise_for_status()

    async with httpx2.AsyncClient(event_hooks={"response": [look]}) as own:
        client = openai.AsyncOpenAI(base_url=one.url, api_key="sk-test", http_client=own)
        error = (await asked(client)).exception
    assert isinstance(error, RateLimited)
    assert str(error) == ("HTTP 429: slow down" if is_read else "HTTP 429 without a word")
