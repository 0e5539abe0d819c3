"""POST /v1/rank: cosines, order and probabilities; and the pages that describe the service."""

from __future__ import annotations

import re
from typing import Any

import httpx
import numpy as np
import pytest

from clipfleet.encoder import Encoder
from tests.deployments.broken import BROKEN
from tests.deployments.test_http_embeddings import as_image, refused
from tests.library import Library

TEXTS = ["a red circle", "a blue star", "a white ring", "a black cross"]


def rank(http: httpx.Client, query: Any, candidates: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/rank", json={"query": query, "candidates": candidates})
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["object", "model", "fingerprint", "results"]
    return answer.json()["results"]


def expected(query: np.ndarray, candidates: np.ndarray) -> list[dict[str, float]]:
    """From the definition: cosines, a softmax over them times the checkpoint's temperature."""
    cosines = candidates.astype(np.float64) @ query.astype(np.float64)
    powers = np.exp(Encoder("tiny", "cpu").logit_scale * (cosines - cosines.max()))
    order = np.argsort(-cosines, kind="stable")
    return [{"index": int(i), "score": cosines[i], "probability": powers[i] / powers.sum()} for i in order]


def test_an_image_against_texts(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    found = rank(http, as_image(files[0]), TEXTS)
    wanted = expected(library.images(files[:1])[0], library.texts(TEXTS))
    assert [result["index"] for result in found] == [result["index"] for result in wanted]
    for name in ("score", "probability"):
        assert [result[name] for result in found] == pytest.approx([result[name] for result in wanted], abs=1e-4)
    assert sum(result["probability"] for result in found) == pytest.approx(1, abs=1e-5)


def test_a_text_against_images_and_texts(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    found = rank(http, {"text": TEXTS[0]}, [as_image(files[0]), TEXTS[1], as_image(files[1])])
    candidates = np.stack([library.images(files[:1])[0], library.texts(TEXTS[1:2])[0], library.images(files[1:2])[0]])
    wanted = expected(library.texts(TEXTS[:1])[0], candidates)
    assert [result["index"] for result in found] == [result["index"] for result in wanted]
    assert [result["score"] for result in found] == pytest.approx([result["score"] for result in wanted], abs=1e-5)


def test_one_candidate(http: httpx.Client) -> None:
    assert rank(http, "a red circle", ["a red circle"])[0] == {
        "index": 0,
        "score": pytest.approx(1, abs=1e-5),
        "probability": 1.0,
    }


def test_what_is_refused(http: httpx.Client) -> None:
    def post(**body: Any) -> httpx.Response:
        return http.post("/v1/rank", json=body)

    bad = as_image(BROKEN["cut JPEG"].data)
    refused(post(query=bad, candidates=["a"]), 422, "image_corrupt", "query")
    refused(post(query="a", candidates=["b", bad]), 422, "image_corrupt", "candidates[1]")
    refused(post(query="a", candidates=[]), 400, "empty_input", "candidates")
    refused(post(query="a"), 400, "invalid_request", "candidates")
    refused(post(candidates=["a"]), 400, "invalid_request", "query")
    refused(post(query="a", candidates="b"), 400, "invalid_request", "candidates")
    refused(post(query=["a"], candidates=["b"]), 400, "invalid_request", "query")
    refused(post(query="a", candidates=["b"], model="x"), 404, "model_not_found", "model")


def test_the_reference_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    assert not re.findall(r"(?:src|href|url|import|fetch)\s*[=(]\s*[\"']?(?:https?:)?//", page.text)
    assert "/v1/embeddings" in page.text or "openapi.json" in page.text


def test_the_schema_lists_every_route(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert set(schema["paths"]) >= {
        "/v1/embeddings", "/v1/embeddings/images", "/v1/rank", "/v1/models", "/healthz", "/readyz",
    }  # fmt: skip
