"""Who may talk to an application, and by which name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from fractal import BaseAgent, InvalidArguments
from fractal.serving import serving_app
from fractal.testing import ScriptedModel
from tests.on_uvicorn import on_uvicorn

TOKEN = "Zaubertränk +&=/%"


def app(**options: Any) -> Any:
    return serving_app(BaseAgent("Guide", "g", client=ScriptedModel(["hello"] * 9)), grace=0, **options)


@pytest.fixture
def guarded() -> Iterator[str]:
    with on_uvicorn(app(token=TOKEN)) as url:
        yield url


def client(**options: Any) -> httpx2.Client:
    return httpx2.Client(trust_env=False, **options)


PATHS = ["/", "/chat/page.js", "/runs", "/health", "/openapi.json", "/v1/models", "/nothing"]
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer x"},
    {"authorization": TOKEN.encode("latin-1").decode("latin-1")},
    {"cookie": "fractal_access=x"},
    {"cookie": 'a="; fractal_access'},
]


def test_nothing_is_told_to_who_does_not_know_the_token(guarded: str):
    with client(base_url=guarded) as one:
        for path in PATHS:
            for given in WRONG:
                headers = {name: value.encode("latin-1") for name, value in given.items()}
                assert one.get(path, headers=headers).status_code == 401
            assert one.get(path, params={"token": "x"}).status_code == 401
        assert one.post("/runs", json={"input": "hi"}).status_code == 401


def test_programs_send_the_token_as_bearer(guarded: str):
    with client(base_url=guarded, headers={"authorization": b"bearer " + TOKEN.encode()}) as one:
        assert one.get("/health").status_code == 401  # headers are latin-1 for servers
    with client(base_url=guarded) as one:
        bearer = {"authorization": f"Bearer {TOKEN}".encode("latin-1")}
        assert one.get("/health", headers=bearer).status_code == 200
        assert one.post("/runs", json={"input": "hi"}, headers=bearer).json()["result"]["content"] == "hello"


def test_a_browser_gets_a_cookie_and_the_token_leaves_the_address(guarded: str):
    with client(base_url=guarded) as one:
        answer = one.get("/", params={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "./")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert TOKEN not in cookie
        assert one.get("/").status_code == 200
        assert one.get("/health").status_code == 200


def test_the_token_leaves_the_address_of_a_browser_that_has_the_cookie_already(guarded: str):
    with client(base_url=guarded) as one:
        one.get("/", params={"token": TOKEN})
        again = one.get("/", params={"token": TOKEN})
    assert (again.status_code, again.headers["location"]) == (303, "./")


@pytest.mark.parametrize("other", ['theme={"dark": true}', "a=1,2 3", "x", "é=ü", "a[b]=c"])
def test_cookies_of_other_programs_on_this_machine_are_no_hindrance(guarded: str, other: str):
    with client(base_url=guarded) as one:
        ours = one.get("/", params={"token": TOKEN}).headers["set-cookie"].partition(";")[0]
    for cookies in (f"{other}; {ours}", f"{ours}; {other}"):
        assert httpx2.get(f"{guarded}/health", headers={"cookie": cookies.encode()}, trust_env=False).status_code == 200


@pytest.mark.parametrize("token", ["", "  ", b"secret", 7])
def test_a_token_that_lets_everybody_in_is_refused(token: Any):
    with pytest.raises(InvalidArguments, match="token"):
        app(token=token)


def test_the_token_in_an_address_is_for_pages_alone(guarded: str):
    with client(base_url=guarded) as one:
        assert one.post("/runs", json={"input": "hi"}, params={"token": TOKEN}).status_code == 401


def test_openai_s_client_gets_its_own_kind_of_error():
    with on_uvicorn(app(token="secret")) as url, client() as http:
        one = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", http_client=http)
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
            one.models.list()
        assert [each.id for each in one.with_options(api_key="secret").models.list()] == ["Guide"]


def test_other_names_of_the_host_are_refused():
    ours = ["127.0.0.1", "127.0.0.1:80", "LOCALHOST:8000", "[::1]:8000"]
    others = ["rebound.test", "127.0.0.1.rebound.test", "", "[::1", "localhost@rebound.test", "rebound.test:127.0.0.1"]
    with on_uvicorn(app(hosts=["127.0.0.1", "localhost", "::1"])) as url, client() as one:
        assert [one.get(url, headers={"host": host}).status_code for host in ours] == [200] * len(ours)
        assert [one.get(url, headers={"host": host}).status_code for host in others] == [421] * len(others)


def test_another_site_cannot_post_by_a_form(guarded: str):
    with client(base_url=guarded) as one:
        one.get("/", params={"token": TOKEN})
        answer = one.post("/runs", content='{"input": "hi"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_no_page_of_the_application_loads_from_elsewhere():
    with on_uvicorn(app()) as url, client() as one:
        assert one.get(f"{url}/docs").status_code == one.get(f"{url}/redoc").status_code == 404
        assert one.get(f"{url}/openapi.json").status_code == 200
