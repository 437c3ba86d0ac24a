"""Access to a server: API keys, hosts, origins."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from jllm_runtime.errors import ServerError
from jllm_runtime.server.config import ServerConfig

KEYS = ("first-key", "second-key")
CLOSED = ["/v1/models", "/stats", "/timeline", "/metrics", "/openapi.json", "/nothing", "/health/", "/staticx"]


@pytest.fixture
def locked(serve, talker) -> Iterator[Any]:
    """A server with two keys."""
    with serve(talker, api_keys=KEYS) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- Keys.


def test_each_key_opens(locked) -> None:
    for key in KEYS:
        with locked.openai(api_key=key) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
    assert locked.get("/stats", headers={"Authorization": "bearer first-key"}).is_success


def test_anything_else_does_not(locked) -> None:
    wrong = [{}, {"Authorization": "first-key"}, {"Authorization": "Basic first-key"}, {"Authorization": "Bearer"}]
    wrong += [bearer(key) for key in ("first", "first-key2", "FIRST-KEY", "first-key,second-key")]
    wrong += [{"Authorization": "Bearer Ã©".encode()}, {"X-API-Key": "first-key"}]
    for path in CLOSED:
        for headers in wrong:
            reply = locked.get(path, headers=headers)
            assert reply.status_code == 401, (path, headers)
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.json()["error"]["code"] == "invalid_api_key"
    with locked.openai(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert locked.post("/v1/completions", {"model": "tiny", "prompt": "a"}).status_code == 401


def test_how_the_server_is_needs_no_key(locked) -> None:
    assert locked.get("/health").json() == locked.get("/ready").json() == {"status": "ok"}
    assert locked.get("/static/nothing").status_code == 404
    assert "<html" in locked.get("/").text


def test_keys_are_compared_whole(locked, monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time, and with each of them."""
    compared: list[bytes] = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return given == key

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert locked.get("/stats", headers=bearer("first-key")).is_success
    assert compared == [key.encode() for key in KEYS]


# ---- Hosts.


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000", "my.name:8000"])
def test_a_server_without_keys_is_called_by_this_machine_s_names(host: str, serve, talker) -> None:
    with serve(talker, allowed_hosts=("My.Name",)) as server:
        assert server.get("/stats", headers={"Host": host}).is_success


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "192.168.0.1", ""])
def test_a_web_page_cannot_call_it_by_a_name_of_its_own(host: str, server) -> None:
    reply = server.get("/stats", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")


def test_with_keys_the_name_does_not_matter(locked) -> None:
    assert locked.get("/stats", headers={"Host": "elsewhere.example", **bearer(KEYS[0])}).is_success


# ---- Web pages of other origins.


def preflight(url: str, origin: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    return httpx.options(f"{url}/v1/chat/completions", headers={"Origin": origin, **asked})


def test_other_origins_may_not_call(server) -> None:
    reply = preflight(server.url, "https://example.org")
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in server.get("/stats", headers={"Origin": "https://example.org"}).headers


def test_other_origins_may_call_where_they_are_named(serve, talker) -> None:
    with serve(talker, cors_origins=("https://example.org",), api_keys=KEYS) as server:
        reply = preflight(server.url, "https://example.org")  # which has no key
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://example.org")
        refused = server.get("/stats", headers={"Origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.org"  # so that the page can read it
        assert preflight(server.url, "https://other.example").status_code == 400


# ---- Settings that cannot be.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_keys": ("",)}, "an API key must be printable ASCII without spaces, and not empty"),
        ({"api_keys": ("a b",)}, "an API key must be"),
        ({"api_keys": ("schlüssel",)}, "an API key must be"),
        ({"cors_origins": ("example.org",)}, "must be like https://example.org, or "),
        ({"cors_origins": ("https://example.org/",)}, "must be like"),
        ({"names": ("",)}, "a model's name must be printable"),
        ({"port": 65536}, "port must be from 0 to 65535, got 65536"),
        ({"max_body": 0}, "max_body must be 1 or above, got 0"),
        ({"max_prompt": 0}, "max_prompt must be"),
        ({"request_timeout": 0.0}, "request_timeout must be a number of seconds above 0"),
        ({"drain_timeout": float("inf")}, "drain_timeout must be"),
        ({"receive_timeout": 0.0}, "receive_timeout must be a number of seconds above 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        ServerConfig(**fields)


def test_settings_that_can_be(serve: Callable[..., Any]) -> None:
    ServerConfig(cors_origins=("*", "http://localhost:3000"), names=("org/model",), max_prompt=5)
