"""POST /v1/embeddings/images: raw bytes and multipart in, JSON or .npy out."""

from __future__ import annotations

import base64
import io
import json
import socket

import httpx
import numpy as np
import pytest

from tests.deployments.broken import BROKEN
from tests.deployments.service import Service
from tests.deployments.test_http_embeddings import refused, vectors
from tests.library import Library
from tests.pictures import encode, picture

URL = "/v1/embeddings/images"
NPY = {"Accept": "application/x-npy"}


def upload(files: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (f"{number}.png", data, "image/png")) for number, data in enumerate(files)]


def npy(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/x-npy"
    return np.load(io.BytesIO(answer.content), allow_pickle=False)


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream"])
def test_raw_bytes_whatever_type_they_claim(
    http: httpx.Client, library: Library, files: list[bytes], kind: str
) -> None:
    answer = http.post(URL, content=files[0], headers={"Content-Type": kind})
    assert np.abs(vectors(answer) - library.images(files[:1])).max() <= 1e-5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format(http: httpx.Client, library: Library, kind: str) -> None:
    data = encode(picture("RGB", 300, 210), kind)
    answer = http.post(URL, content=data, headers={"Content-Type": f"image/{kind.lower()}"})
    assert np.abs(vectors(answer) - library.images([data])).max() <= 1e-5


def test_many_files_in_order(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    answer = http.post(URL, files=upload(files))
    assert np.abs(vectors(answer) - library.images(files)).max() <= 1e-5
    assert answer.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize("count", [1, 5])
def test_npy_has_a_row_an_image(http: httpx.Client, library: Library, files: list[bytes], count: int) -> None:
    found = npy(http.post(URL, files=upload(files[:count]), headers=NPY))
    assert (found.shape, found.dtype) == ((count, 512), np.float32)
    assert np.abs(found - library.images(files[:count])).max() <= 1e-5


def test_npy_of_a_raw_image_in_half_precision(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    answer = http.post(URL, content=files[0], headers={**NPY, "Content-Type": "image/png"}, params={"dtype": "float16"})
    found = npy(answer)
    assert (found.shape, found.dtype) == ((1, 512), np.float16)
    assert np.abs(found - library.images(files[:1])).max() <= 1e-3


def test_base64_by_query(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    answer = http.post(URL, files=upload(files[:2]), params={"encoding_format": "base64"})
    rows = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in answer.json()["data"]]
    assert np.abs(np.stack(rows) - library.images(files[:2])).max() <= 1e-5


def test_partial_npy_marks_bad_rows(http: httpx.Client, library: Library, files: list[bytes]) -> None:
    sent = [files[0], BROKEN["cut JPEG"].data, files[1], BROKEN["PDF"].data]
    answer = http.post(URL, files=upload(sent), headers=NPY, params={"on_error": "partial"})
    found = npy(answer)
    assert found.shape == (4, 512) and np.isnan(found[[1, 3]]).all()
    assert np.abs(found[[0, 2]] - library.images(files[:2])).max() <= 1e-5
    assert json.loads(answer.headers["X-Clipfleet-Errors"]) == [
        {"index": 1, "code": "image_corrupt"},
        {"index": 3, "code": "image_format_unsupported"},
    ]


def test_partial_json(http: httpx.Client, files: list[bytes]) -> None:
    answer = http.post(URL, files=upload([b"", files[0]]), params={"on_error": "partial"})
    rows = answer.json()["data"]
    assert answer.status_code == 200
    assert rows[0]["embedding"] is None and rows[0]["error"]["code"] == "image_empty"
    assert len(rows[1]["embedding"]) == 512


@pytest.mark.parametrize("name", list(BROKEN))
def test_each_broken_upload_has_its_status_and_code(http: httpx.Client, files: list[bytes], name: str) -> None:
    broken = BROKEN[name]
    refused(http.post(URL, files=upload([files[0], broken.data])), broken.status, broken.code, "files[1]")
    raw = http.post(URL, content=broken.data, headers={"Content-Type": "image/png"})
    refused(raw, broken.status, broken.code, "files[0]")


def test_what_is_no_upload(http: httpx.Client) -> None:
    json_body = http.post(URL, json={"input": "a"})
    assert json_body.status_code == 400 and json_body.json()["error"]["code"] == "invalid_request"
    no_boundary = http.post(URL, content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert no_boundary.status_code == 400
    cut = http.post(URL, content=b"--b\r\nContent-Disp", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert cut.status_code == 400
    no_files = http.post(URL, files={"note": (None, b"only a field")})
    assert no_files.status_code == 400 and no_files.json()["error"]["code"] == "empty_input"


def test_too_many_files_and_bytes(http: httpx.Client, files: list[bytes]) -> None:
    answer = http.post(URL, files=upload([files[0]] * 65))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_many_items"
    large = b"\x89PNG\r\n\x1a\n" + bytes(17 * 2**20)
    answer = http.post(URL, files=upload([large] * 4))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_options_that_are_none(http: httpx.Client, files: list[bytes]) -> None:
    for name, value in (("dtype", "int8"), ("on_error", "x"), ("encoding_format", "hex")):
        answer = http.post(URL, content=files[0], headers={"Content-Type": "image/png"}, params={name: value})
        refused(answer, 400, "invalid_request", name)
    answer = http.post(URL, content=files[0], headers={"Content-Type": "image/png"}, params={"model": "other"})
    refused(answer, 404, "model_not_found", "model")


def multipart(*parts: bytes, end: bytes = b"--cut--\r\n") -> dict[str, object]:
    body = b"".join(b"--cut\r\n" + part + b"\r\n" for part in parts) + end
    return {"content": body, "headers": {"Content-Type": "multipart/form-data; boundary=cut"}}


def part(name: bytes, content: bytes) -> bytes:
    return b"Content-Disposition: form-data; name=files; " + name + b"\r\n\r\n" + content


def test_a_multipart_body_that_was_cut_is_refused(http: httpx.Client, files: list[bytes]) -> None:
    """Its last image would be missing without a word."""
    one, two = part(b'filename="1.png"', files[0]), part(b'filename="2.png"', files[1])
    assert len(vectors(http.post(URL, **multipart(one, two)))) == 2
    for end in (b"", b"--cut", b"--cut\r\n" + two[: len(two) // 2]):
        refused(http.post(URL, **multipart(one, end=end)), 400, "invalid_request", None)


def test_parts_that_name_their_file_otherwise(http: httpx.Client, files: list[bytes]) -> None:
    parts = (
        part(b"filename*=UTF-8''%C3%A4.png", files[0]),
        part(b"filename=2.png", files[1]),
        part(b"x=1", b"a field"),
    )
    assert len(vectors(http.post(URL, **multipart(*parts)))) == 2


def test_uploads_that_stall_do_not_keep_others_out(service: Service, http: httpx.Client, files: list[bytes]) -> None:
    head = b"POST /v1/embeddings/images HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    stalled = []
    try:
        for _ in range(10):  # 640 MiB announced
            connection = socket.create_connection(("127.0.0.1", service.port))
            connection.sendall(head % 2**26 + bytes(5 * 2**20))  # more than HAProxy waits for
            stalled.append(connection)
        assert len(vectors(http.post(URL, files=upload(files[:2])))) == 2
    finally:
        for connection in stalled:
            connection.close()
