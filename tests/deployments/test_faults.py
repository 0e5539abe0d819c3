"""Faults that libraries and devices have, injected into a running service: what each request gets, and what is replaced."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service, serving
from tests.library import Library
from tests.pictures import encode, picture

INJECTED = ROOT / "faults" / "injected"  # its sitecustomize.py says what these do
RAW = {"Content-Type": "application/octet-stream", "Accept": "application/x-npy"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def faulty(flags: Path) -> Iterator[Service]:
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["applications"][0]["args"]["limits"] = {"forward_s": 2}
    file = flags / "faulty.yaml"
    file.write_text(yaml.safe_dump(config))
    with serving(file, PYTHONPATH=str(INJECTED), FAULTS=str(flags)) as service:
        yield service


def send(service: Service, body: bytes) -> httpx.Response:
    with service.client(headers=RAW) as http:
        return http.post("/v1/embeddings/images", content=body)


@pytest.fixture
def good(library: Library) -> tuple[bytes, np.ndarray]:
    body = encode(picture("RGB", 300, 200), "JPEG")
    return body, library.images([body])[0]


def is_right(answer: httpx.Response, vector: np.ndarray) -> bool:
    return answer.status_code == 200 and bool(np.abs(np.load(io.BytesIO(answer.content))[0] - vector).max() < 1e-5)


def test_a_forward_pass_that_raises(faulty: Service, flags: Path, good: tuple[bytes, np.ndarray]) -> None:
    body, vector = good
    (flags / "raise").touch()
    answer = send(faulty, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["Retry-After"] == "1" and "out of memory" not in answer.text
    assert is_right(send(faulty, body), vector)


def test_a_forward_pass_that_hangs(faulty: Service, flags: Path, good: tuple[bytes, np.ndarray]) -> None:
    body, vector = good
    (before,) = faulty.replicas("ImageEncoder")
    (flags / "hang").touch()
    # Its process is ended after 2 s, and the request goes to the one that comes instead.
    assert is_right(send(faulty, body), vector)
    assert before not in faulty.replicas("ImageEncoder")
    with faulty.client() as http:
        until(lambda: http.get("/readyz").status_code == 200, 60, "ready again")


def test_an_image_that_ends_its_decoder(faulty: Service, good: tuple[bytes, np.ndarray]) -> None:
    body, vector = good
    file = io.BytesIO()
    Image.new("RGB", (300, 200)).save(file, "JPEG", comment=b"clipfleet: end this process")
    answer = send(faulty, file.getvalue())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image_crashed_decoder")
    assert is_right(send(faulty, body), vector)
