"""Faults that libraries and devices have, injected into a running service: what each request gets, and what is replaced."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.deployments.processes import until
from tests.deployments.service import Service
from tests.library import Library
from tests.pictures import encode, picture

Good = Callable[[], tuple[bytes, np.ndarray]]

RAW = {"Content-Type": "application/octet-stream", "Accept": "application/x-npy"}
_widths = count(300)


def send(service: Service, body: bytes) -> httpx.Response:
    with service.client(headers=RAW) as http:
        return http.post("/v1/embeddings/images", content=body)


@pytest.fixture
def good(library: Library) -> Good:
    """Makes an image that no cache has, with its vector."""

    def make() -> tuple[bytes, np.ndarray]:
        body = encode(picture("RGB", next(_widths), 200), "JPEG")
        return body, library.images([body])[0]

    return make


def is_right(answer: httpx.Response, vector: np.ndarray) -> bool:
    return answer.status_code == 200 and bool(np.abs(np.load(io.BytesIO(answer.content))[0] - vector).max() < 1e-5)


def log_of(service: Service, deployment: str) -> str:
    """What its replicas have logged by now."""
    files = service.folder.rglob(f"replica_clipfleet_{deployment}_*.log")
    return "".join(file.read_text(errors="replace") for file in files)


def test_a_forward_pass_that_raises(other_service: Service, flags: Path, good: Good) -> None:
    for _ in range(5):  # a probe may take a fault for itself
        (flags / "raise").touch()
        answer = send(other_service, good()[0])
        if answer.status_code != 200:
            break
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["Retry-After"] == "1" and "out of memory" not in answer.text
    until(lambda: "out of memory" in log_of(other_service, "ImageEncoder"), 30, "what its log says of that")
    body, vector = good()
    assert is_right(send(other_service, body), vector)


def test_a_forward_pass_that_hangs(other_service: Service, flags: Path, good: Good) -> None:
    body, vector = good()
    (before,) = other_service.replicas("ImageEncoder")
    (flags / "hang").touch()
    # Its process is ended after 2 s, and the request goes to the one that comes instead.
    assert is_right(send(other_service, body), vector)
    assert before not in other_service.replicas("ImageEncoder")
    with other_service.client() as http:
        until(lambda: http.get("/readyz").status_code == 200, 60, "ready again")


def test_an_image_that_ends_its_decoder(other_service: Service, good: Good) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG", comment=b"clipfleet: end this process")
    answer = send(other_service, file.getvalue())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image_crashed_decoder")
    body, vector = good()
    assert is_right(send(other_service, body), vector)
