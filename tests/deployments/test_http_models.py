"""GET /v1/models, /healthz and /readyz, and the header that every answer has."""

from __future__ import annotations

import httpx
import pytest

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from tests.deployments.service import Service

TINY = {
    "id": "tiny",
    "object": "model",
    "revision": None,
    "dimension": 512,
    "context_length": 77,
    "image_size": 224,
    "precision": "float32",
    "engine": "openvino",
}


def test_the_ready_line_names_address_and_model(service: Service) -> None:
    assert service.command.out == f"clipfleet ready: {service.url} model=tiny\n"
    assert service.command.err == ""


def test_models_lists_the_served_checkpoint(http: httpx.Client) -> None:
    answer = http.get("/v1/models")
    tiny = {**TINY, "fingerprint": fingerprint(find_checkpoint("tiny"))}
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == {"object": "list", "data": [tiny]}
    assert http.get("/v1/models/tiny").json() == tiny


def test_an_id_may_hold_slashes(http: httpx.Client) -> None:
    for path in ("/v1/models/openai/clip-vit-base-patch32", "/v1/models/openai%2Fclip-vit-base-patch32"):
        answer = http.get(path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'openai/clip-vit-base-patch32'" in error["message"] and "'tiny'" in error["message"]


def test_alive_and_ready_name_each_deployment(http: httpx.Client) -> None:
    deployments = dict.fromkeys(("Ingress", "ImageDecoder", "ImageEncoder", "TextEncoder"), "ready")
    assert http.get("/healthz").json() == {"status": "alive", "deployments": deployments}
    assert http.get("/readyz").json() == {"status": "ready", "deployments": deployments}


@pytest.mark.parametrize("path", ["/readyz", "/healthz", "/v1/models", "/docs"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    answer = http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == http.get(path).headers["content-type"]


@pytest.mark.parametrize("path", ["/-/routes", "/-/ROUTES", "/-/%72outes", "/-clipfleet-previous/v1/models"])
def test_what_serve_and_an_upgrade_use_is_not_public(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")
    assert answer.headers["cache-control"] == "no-cache", "HAProxy's own"


def test_every_answer_carries_the_fingerprint(http: httpx.Client) -> None:
    expected = fingerprint(find_checkpoint("tiny"))
    answers = [
        http.get("/v1/models"),
        http.get("/healthz"),
        http.get("/readyz"),
        http.get("/docs"),
        http.get("/openapi.json"),
        http.post("/v1/embeddings", json={"input": "a red circle"}),
        http.post("/v1/rank", json={"query": "a", "candidates": ["b"]}),
        http.get("/v1/nothing"),
        http.put("/v1/embeddings"),
        http.post("/v1/embeddings", content=b"no JSON"),
        http.post("/v1/embeddings/images", content=b"", headers={"Content-Type": "image/png"}),
        http.post("/v1/embeddings", json={"input": "late"}, headers={"X-Deadline-Ms": "1"}),
    ]
    assert {answer.status_code for answer in answers} == {200, 404, 405, 400, 422, 504}
    assert [answer.headers["X-Clipfleet-Fingerprint"] for answer in answers] == [expected] * len(answers)


def test_pages_of_another_origin_may_ask_where_it_is_set(service: Service, other_service: Service) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}

    def allowed(asked: Service, origin: str) -> tuple[str | None, str | None]:
        with asked.client(headers={"Origin": origin}) as http:
            answers = http.options("/v1/embeddings", headers=wanted), http.post("/v1/embeddings", json={"input": "a"})
        preflight, answer = (each.headers.get("access-control-allow-origin") for each in answers)
        return preflight, answer

    assert allowed(other_service, "https://shop.example") == ("https://shop.example",) * 2
    assert allowed(other_service, "https://other.example") == (None, None)
    assert allowed(service, "https://shop.example") == (None, None)
