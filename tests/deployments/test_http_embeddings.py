"""POST /v1/embeddings: forms of input, forms of answer, and what is refused, over a real socket."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from clipfleet.errors import ClipfleetError
from tests.deployments.broken import BROKEN
from tests.library import Library


def post(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/embeddings", json=body)


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    rows = answer.json()["data"]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], np.float32)


def as_image(data: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(data).decode()}


def refused(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check an error answer; returns its message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "code", "param"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["message"]
    return body["error"]["message"]


class TestInput:
    def test_one_text(self, http: httpx.Client, library: Library) -> None:
        answer = post(http, input="a red circle", model="tiny")
        assert np.abs(vectors(answer) - library.texts(["a red circle"])).max() <= 1e-5
        body = answer.json()
        assert list(body) == ["object", "data", "model", "fingerprint", "usage"]
        assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "tiny", "embedding")
        assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0

    def test_texts_and_images_in_one_list_keep_their_order(
        self, http: httpx.Client, library: Library, files: list[bytes]
    ) -> None:
        items: list[Any] = ["a red circle", as_image(files[0]), {"text": "a blue star"}, as_image(files[1]), "a ring"]
        expected = np.empty((5, 512), np.float32)
        expected[[0, 2, 4]] = library.texts(["a red circle", "a blue star", "a ring"])
        expected[[1, 3]] = library.images(files[:2])
        found = vectors(post(http, input=items))
        assert np.abs(found - expected).max() <= 1e-5
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-5

    def test_an_image_may_be_a_data_uri_or_base64(
        self, http: httpx.Client, library: Library, files: list[bytes]
    ) -> None:
        text = base64.b64encode(files[0]).decode()
        unpadded = base64.urlsafe_b64encode(files[0]).decode().rstrip("=")
        forms = [text, f"data:image/png;base64,{text}", unpadded]
        expected = library.images(files[:1])
        assert np.abs(vectors(post(http, input=[{"image": form} for form in forms])) - expected).max() <= 1e-5
        assert np.abs(vectors(post(http, input=forms, modality="image")) - expected).max() <= 1e-5
        assert np.abs(vectors(post(http, input={"image": text})) - expected).max() <= 1e-5

    def test_a_text_over_the_context_is_cut_and_says_so(self, http: httpx.Client) -> None:
        rows = post(http, input=["word " * 300, "short"]).json()["data"]
        assert rows[0]["truncated"] is True and "truncated" not in rows[1]

    def test_as_many_as_the_limits_allow(self, http: httpx.Client, library: Library, files: list[bytes]) -> None:
        many = [files[number % len(files)] for number in range(64)]
        assert np.abs(vectors(post(http, input=[as_image(data) for data in many])) - library.images(many)).max() <= 1e-5
        texts = [f"text number {number}" for number in range(2048)]
        found = vectors(post(http, input=texts))
        assert np.abs(found[[0, 1023, 2047]] - library.texts([texts[0], texts[1023], texts[2047]])).max() <= 1e-5


class TestAnswer:
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
    def test_base64_is_little_endian(self, http: httpx.Client, library: Library, dtype: str, tolerance: float) -> None:
        row = post(http, input="a red circle", encoding_format="base64", dtype=dtype).json()["data"][0]
        found = np.frombuffer(base64.b64decode(row["embedding"]), np.dtype(dtype).newbyteorder("<"))
        assert found.shape == (512,)
        assert np.abs(found - library.texts(["a red circle"])[0]).max() <= tolerance

    def test_dimensions_may_only_be_the_checkpoints(self, http: httpx.Client) -> None:
        assert post(http, input="a", dimensions=512).status_code == 200
        message = refused(post(http, input="a", dimensions=256), 400, "unsupported_dimensions", "dimensions")
        assert "256" in message and "512" in message

    def test_partial_gives_each_item_a_vector_or_an_error(
        self, http: httpx.Client, library: Library, files: list[bytes]
    ) -> None:
        bad = BROKEN["cut PNG"].data
        items = [as_image(files[0]), as_image(bad), "a text", {"image": "%%%"}, {"image": "https://example.org/a.png"}]
        answer = post(http, input=items, on_error="partial")
        assert answer.status_code == 200
        rows = answer.json()["data"]
        codes = [row.get("error", {}).get("code") for row in rows]
        assert codes == [None, "image_corrupt", None, "invalid_base64", "image_urls_disabled"]
        assert [row["embedding"] is None for row in rows] == [code is not None for code in codes]
        assert np.abs(np.array(rows[0]["embedding"]) - library.images(files[:1])[0]).max() <= 1e-5

    def test_fail_names_the_first_bad_item(self, http: httpx.Client, files: list[bytes]) -> None:
        items = [as_image(files[0]), "text", as_image(BROKEN["no bytes"].data), as_image(BROKEN["text"].data)]
        refused(post(http, input=items), 422, "image_empty", "input[2]")


class TestRefusals:
    @pytest.mark.parametrize("name", [name for name in BROKEN if name != "over 20 MiB"])
    def test_each_broken_image_has_its_status_and_code(self, http: httpx.Client, name: str) -> None:
        broken = BROKEN[name]
        refused(post(http, input=["good", as_image(broken.data)]), broken.status, broken.code, "input[1]")

    @pytest.mark.parametrize(
        ("body", "code", "param"),
        [
            ({"input": []}, "empty_input", "input"),
            ({"input": ["a", {"image": "no base64!"}]}, "invalid_base64", "input[1]"),
            ({"input": {"image": "https://example.org/a.png"}}, "image_urls_disabled", "input[0]"),
            ({"input": {"image": "ftp://example.org/a.png"}}, "unsupported_scheme", "input[0]"),
            ({"input": {"image": "file:///etc/passwd"}}, "unsupported_scheme", "input[0]"),
            ({}, "invalid_request", "input"),
            ({"input": None}, "invalid_request", "input"),
            ({"input": 7}, "invalid_request", "input"),
            ({"input": [7]}, "invalid_request", "input[0]"),
            ({"input": [["nested"]]}, "invalid_request", "input[0]"),
            ({"input": [{"text": "a", "image": "b"}]}, "invalid_request", "input[0]"),
            ({"input": [{}]}, "invalid_request", "input[0]"),
            ({"input": [{"text": 7}]}, "invalid_request", "input[0]"),
            ({"input": "a", "modality": "audio"}, "invalid_request", "modality"),
            ({"input": "a", "encoding_format": "hex"}, "invalid_request", "encoding_format"),
            ({"input": "a", "dtype": "int8"}, "invalid_request", "dtype"),
            ({"input": "a", "on_error": "ignore"}, "invalid_request", "on_error"),
            ({"input": "a", "dimensions": "many"}, "invalid_request", "dimensions"),
            ({"input": "a" * 100_001}, "invalid_request", "input[0]"),
        ],
        ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
    )
    def test_wrong_bodies(self, http: httpx.Client, body: dict[str, Any], code: str, param: str) -> None:
        refused(post(http, **body), 400, code, param)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[1]", b'"text"', b"null", b'{"input": NaN}', b'{"input": "\xff"}', b'{"input": "\\ud800"}',
         b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"\x00" * 100],
        ids=lambda content: repr(content[:16]),
    )  # fmt: skip
    def test_what_is_no_json_object(self, http: httpx.Client, content: bytes) -> None:
        answer = http.post("/v1/embeddings", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"

    def test_another_model(self, http: httpx.Client) -> None:
        message = refused(post(http, input="a", model="gpt-4"), 404, "model_not_found", "model")
        assert "'gpt-4'" in message and "'tiny'" in message

    def test_too_many_items(self, http: httpx.Client) -> None:
        message = refused(post(http, input=["a"] * 2049), 413, "too_many_items", "input")
        assert "2,049" in message and "2,048" in message
        message = refused(post(http, input=[{"image": "aGVsbG8="}] * 65), 413, "too_many_items", "input")
        assert "65" in message and "64" in message

    def test_a_body_over_the_limit(self, http: httpx.Client) -> None:
        body = b'{"input": "' + b"a" * (64 * 2**20) + b'"}'
        refused(http.post("/v1/embeddings", content=body), 413, "body_too_large")
        chunks = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
        refused(http.post("/v1/embeddings", content=chunks), 413, "body_too_large")

    @pytest.mark.parametrize("deadline", ["0", "-5", "soon", "1.5", "1e3", ""])
    def test_a_deadline_that_makes_no_sense(self, http: httpx.Client, deadline: str) -> None:
        answer = http.post("/v1/embeddings", json={"input": "a"}, headers={"X-Deadline-Ms": deadline})
        assert "X-Deadline-Ms" in refused(answer, 400, "invalid_request")

    def test_a_deadline_that_has_passed(self, http: httpx.Client) -> None:
        answer = http.post("/v1/embeddings", json={"input": ["late"] * 2000}, headers={"X-Deadline-Ms": "1"})
        refused(answer, 504, "deadline_exceeded")

    def test_routes_and_methods_that_are_not_there(self, http: httpx.Client) -> None:
        refused(http.get("/v1/nothing"), 404, "route_not_found")
        refused(http.get("/nothing"), 404, "route_not_found")
        answer = http.get("/v1/embeddings")
        refused(answer, 405, "route_not_found")
        assert answer.headers["Allow"] == "POST"


def test_every_error_of_the_tree_has_a_status() -> None:
    from deployments.responses import status_of

    def leaves(kind: type[ClipfleetError]) -> list[type[ClipfleetError]]:
        return [leaf for child in kind.__subclasses__() for leaf in leaves(child)] or [kind]

    assert all(400 <= status_of(leaf("message")) <= 504 for leaf in leaves(ClipfleetError))


@pytest.mark.parametrize("item", ['"a"', '{"text":"a"}', "[]", '{"image":"a,b"}', "1"])
def test_a_body_of_a_million_items_is_refused_unparsed(http: httpx.Client, item: str) -> None:
    body = f'{{"input": [{",".join([item] * 1_000_000)}]}}'
    refused(
        http.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"}),
        413,
        "too_many_items",
        None,
    )


def test_texts_may_be_full_of_commas_and_braces(http: httpx.Client) -> None:
    text = '{,["\\",' * 9_000
    assert len(vectors(http.post("/v1/embeddings", json={"input": [text, "red, green"]}))) == 2


def test_a_deadline_of_endless_zeros(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": "a"}, headers={"X-Deadline-Ms": "0" * 5000 + "1"})
    refused(answer, 400, "invalid_request", None)


@pytest.mark.parametrize(
    "name", ["X-Request-Id", "X-Session-Id", "X-Request-Timeout-Seconds", "serve_multiplexed_model_id"]
)
def test_headers_of_serve_that_are_no_text(http: httpx.Client, name: str) -> None:
    answer = http.post("/v1/embeddings", json={"input": "a"}, headers=[(name.encode(), b"\xff")])
    assert answer.status_code == 200
