"""Routes of other services, asked as their clients ask."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from tests.deployments.broken import BROKEN
from tests.library import Library

TEXTS = ["a red circle", "a blue star"]


def base64_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


class TestInfinity:
    def ask(self, http: httpx.Client, **body: Any) -> np.ndarray:
        answer = http.post("/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert content["object"] == "list" and content["model"] == "tiny" and "prompt_tokens" in content["usage"]
        assert [item["index"] for item in content["data"]] == list(range(len(content["data"])))
        return np.array([item["embedding"] for item in content["data"]], np.float32)

    def test_texts(self, http: httpx.Client, library: Library) -> None:
        expected = library.texts(TEXTS)
        assert np.abs(self.ask(http, model="tiny", input=TEXTS) - expected).max() <= 1e-5
        found = self.ask(http, model="default/not-specified", input=TEXTS[0], modality="text", dimensions=0, user="a")
        assert np.abs(found - expected[:1]).max() <= 1e-5
        assert np.abs(self.ask(http, input=TEXTS, encoding_format="float") - expected).max() <= 1e-5

    def test_images(self, http: httpx.Client, library: Library, files: list[bytes]) -> None:
        sent = [f"data:image/png;base64,{base64_of(file)}" for file in files[:3]]
        expected = library.images(files[:3])
        assert np.abs(self.ask(http, model="tiny", input=sent, modality="image") - expected).max() <= 1e-5
        assert np.abs(self.ask(http, model="tiny", input=sent[0], modality="image") - expected[:1]).max() <= 1e-5

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"model": "another", "input": "a"}, 404, "model_not_found"),
            ({"input": "a", "dimensions": 3}, 400, "unsupported_dimensions"),
            ({"input": "a", "dimensions": False}, 400, "invalid_request"),
            ({"input": "a", "modality": "audio"}, 400, "invalid_request"),
            ({"input": [], "modality": "image"}, 400, "empty_input"),
        ],
    )
    def test_what_is_refused(self, http: httpx.Client, body: dict[str, Any], status: int, code: str) -> None:
        answer = http.post("/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

    def test_models_and_health(self, http: httpx.Client) -> None:
        answer = http.get("/models").json()
        (model,) = answer["data"]
        assert (answer["object"], model["object"], model["id"]) == ("list", "model", "tiny")
        assert model["backend"] == http.get("/v1/models/tiny").json()["engine"]
        assert model["capabilities"] == ["embed", "image_embed"] and 0 <= model["stats"]["queue_fraction"] <= 1
        assert http.get("/health").json()["unix"] > 1.7e9


class TestWeaviate:
    def test_texts_and_images(self, http: httpx.Client, library: Library, files: list[bytes]) -> None:
        body = json.dumps({"texts": TEXTS, "images": [base64_of(file) for file in files[:3]]})
        answer = http.post("/vectorize", content=body)  # Weaviate names no Content-Type
        assert answer.status_code == 200, answer.text
        assert list(answer.json()) == ["textVectors", "imageVectors"]
        assert np.abs(np.array(answer.json()["textVectors"]) - library.texts(TEXTS)).max() <= 1e-5
        assert np.abs(np.array(answer.json()["imageVectors"]) - library.images(files[:3])).max() <= 1e-5

    def test_what_it_has_none_of_is_null(self, http: httpx.Client, library: Library, files: list[bytes]) -> None:
        answer = http.post("/vectorize", json={"texts": TEXTS, "images": None}).json()
        assert len(answer["textVectors"]) == 2 and answer["imageVectors"] == []
        answer = http.post("/vectorize", json={"texts": None, "images": [base64_of(files[0])]}).json()
        assert answer["textVectors"] == [] and len(answer["imageVectors"]) == 1
        assert http.post("/vectorize", json={}).json() == {"textVectors": [], "imageVectors": []}

    def test_a_refusal_is_a_string(self, http: httpx.Client, files: list[bytes]) -> None:
        corrupt = BROKEN["cut JPEG"]
        answer = http.post(
            "/vectorize", json={"texts": ["a"], "images": [base64_of(files[0]), base64_of(corrupt.data)]}
        )
        assert answer.status_code == 422 and answer.json()["error"].startswith("images[1]: ")
        answer = http.post("/vectorize", json={"texts": ["a", ""]})
        assert answer.status_code == 400 and answer.json() == {"error": "texts[1]: the text is empty"}
        answer = http.post("/vectorize", json={"texts": "a"})
        assert answer.status_code == 400 and isinstance(answer.json()["error"], str)

    def test_state(self, http: httpx.Client) -> None:
        assert [http.get(f"/.well-known/{name}").status_code for name in ("live", "ready")] == [204, 204]
        assert http.get("/meta").json() == http.get("/v1/models/tiny").json()
