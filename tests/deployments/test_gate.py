"""API keys and error words, at the ASGI layer itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from clipfleet.errors import InvalidRequest, Overloaded
from clipfleet.keys import KeyRing, add_key, digest, revoke_key
from deployments import gate as module
from deployments.gate import Gate, add_error_handlers, read_deadline, with_cors


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
        gate = Gate(app(), keys=KeyRing(tuple(keys), None), fingerprint=lambda: "f00d")
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


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0)
    file = tmp_path / "keys"
    file.write_text("# nobody yet\n")
    gate = Gate(app(), keys=KeyRing(("fixed",), str(file)), fingerprint=lambda: None)

    async def statuses(*keys: str) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://gate") as client:
            return [
                (await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code for key in keys
            ]

    assert asyncio.run(statuses("fixed", "other")) == [200, 401]
    key = add_key(file, "search-page")
    assert asyncio.run(statuses("fixed", key)) == [200, 200]
    file.write_text("not a file of keys\n")  # a slip: the keys stay as they were
    assert asyncio.run(statuses("fixed", key)) == [200, 200]
    file.write_text(f"search-page {digest(key)}\nother {digest('another')}\n")
    assert asyncio.run(statuses(key, "another")) == [200, 200]
    revoke_key(file, "search-page")
    assert asyncio.run(statuses(key, "another", "fixed")) == [401, 200, 200]
    revoke_key(file, "other")  # an empty file lets nobody in
    assert asyncio.run(statuses(key, "another", "fixed")) == [401, 401, 200]


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


def test_a_preflight_needs_no_key() -> None:
    async def send() -> list[httpx.Response]:
        gate = Gate(app(), keys=KeyRing(("one",), None), fingerprint=lambda: "f00d")
        way = httpx.ASGITransport(with_cors(gate, ["https://shop.example"], ["X-Fingerprint"]))
        origin = {"Origin": "https://shop.example"}
        async with httpx.AsyncClient(transport=way, base_url="http://gate", headers=origin) as client:
            asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
            return [await client.options("/v1/models", headers=asked), await client.get("/v1/models")]

    preflight, refused = asyncio.run(send())
    assert preflight.status_code == 200 and refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://shop.example"
    assert "X-Fingerprint" in refused.headers["access-control-expose-headers"]


def test_a_prefix_without_its_slash_leads_to_the_page() -> None:
    async def asked(path: str) -> httpx.Response:
        gate = Gate(app(), keys=KeyRing(("one",), None), fingerprint=lambda: "f00d")
        transport = httpx.ASGITransport(gate, root_path="/clip")
        async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
            return await client.get(path)

    answer = asyncio.run(asked("/clip"))
    assert (answer.status_code, answer.headers["Location"]) == (307, "/clip/")
    assert asyncio.run(asked("/clip/healthz")).status_code == 200
    assert asyncio.run(asked("/clip/v1/models")).status_code == 401
