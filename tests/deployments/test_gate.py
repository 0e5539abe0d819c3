"""API keys and error words, at the ASGI layer itself."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from clipfleet.errors import InvalidRequest, Overloaded
from deployments.gate import Gate, add_error_handlers, read_deadline


def app() -> FastAPI:
    inner = FastAPI()
    add_error_handlers(inner)

    @inner.get("/healthz")
    @inner.get("/readyz")
    @inner.get("/v1/models")
    def models() -> dict[str, bool]:
        return {"open": True}

    @inner.get("/busy")
    def busy() -> None:
        raise Overloaded("busy", retry_after=2.4)

    @inner.get("/bug")
    def bug() -> None:
        raise RuntimeError("a secret")

    return inner


def get(path: str, keys: list[str], header: str | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        gate = Gate(app(), api_keys=keys, fingerprint=lambda: "f00d")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://gate") as client:
            return await client.get(path, headers={"Authorization": header} if header else {})

    return asyncio.run(send())


def test_without_keys_all_is_open() -> None:
    assert get("/v1/models", []).status_code == 200


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "Bearer  two "])
def test_a_known_key_opens(header: str) -> None:
    assert get("/v1/models", ["one", "two"], header).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer three", "Basic one", "one", "Bearer one two"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/docs"])
def test_any_other_does_not(path: str, header: str | None) -> None:
    answer = get(path, ["one", "two"], header)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")
    assert answer.headers["WWW-Authenticate"] == "Bearer" and answer.headers["X-Clipfleet-Fingerprint"] == "f00d"
    assert "one" not in answer.text and "two" not in answer.text


def test_health_is_open_for_those_who_watch() -> None:
    assert get("/healthz", ["one"]).status_code == get("/readyz", ["one"]).status_code == 200


def test_overloaded_says_when_to_come_back() -> None:
    answer = get("/busy", [])
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_bug_is_no_500_and_tells_no_secret() -> None:
    answer = get("/bug", [])
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
    assert "secret" not in answer.text


def test_a_deadline_is_never_later_than_the_services_own() -> None:
    def deadline(value: str) -> float:
        scope = {"type": "http", "headers": [(b"x-deadline-ms", value.encode())]}
        return read_deadline(Request(scope), 30) - time.time()

    assert 1.9 < deadline("2000") <= 2
    assert 29 < deadline("999999999999999") <= 30
    for value in ("-1", "0", "1e9", "9" * 400, "soon"):
        with pytest.raises(InvalidRequest, match="X-Deadline-Ms"):
            deadline(value)
