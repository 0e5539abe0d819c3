"""One request's broken image is its own problem: its neighbours in decoder and batch get their right vectors."""

from __future__ import annotations

import asyncio
import io
import random
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from scripts.draw_shapes import draw
from tests.deployments.broken import BROKEN
from tests.deployments.service import ROOT, Service
from tests.library import Library
from tests.pictures import encode

CLIENTS = 64
# Small enough to be sent a dozen times at once.
SENT_BROKEN = [broken for name, broken in BROKEN.items() if name != "over 20 MiB"]


def least_difference(vectors: np.ndarray) -> float:
    """The smallest max-abs difference between any two rows of (n, d)."""
    between = np.abs(vectors[:, None] - vectors[None]).max(axis=2)
    return float(between[~np.eye(len(vectors), dtype=bool)].min())


@pytest.fixture(scope="module")
def good() -> list[bytes]:
    rng = random.Random(64)
    return [encode(draw(rng).image, "JPEG", quality=92) for _ in range(2 * CLIENTS)]


async def send_all(service: Service, bodies: list[bytes]) -> list[httpx.Response]:
    """Each body in a request of its own, all at once."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits, trust_env=False) as client:
        headers = {"Content-Type": "image/jpeg", "Accept": "application/x-npy"}
        requests = (client.post("/v1/embeddings/images", content=body, headers=headers) for body in bodies)
        return await asyncio.gather(*requests)


def vector(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))[0]


def test_every_fourth_of_64_concurrent_requests_is_broken(
    service: Service, library: Library, good: list[bytes]
) -> None:
    expected = library.images(good)
    assert least_difference(expected) > 1e-3  # so that a swapped answer fails below

    broken = {place: SENT_BROKEN[place // 4 % len(SENT_BROKEN)] for place in range(3, CLIENTS, 4)}
    bodies = [broken[place].data if place in broken else good[place] for place in range(CLIENTS)]
    answers = asyncio.run(send_all(service, bodies))
    for place, answer in enumerate(answers):
        if place in broken:
            found = (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"])
            assert found == (broken[place].status, broken[place].code, "files[0]")
        else:
            assert np.abs(vector(answer) - expected[place]).max() <= 1e-5

    after = asyncio.run(send_all(service, good[CLIENTS:]))
    assert np.abs(np.stack([vector(answer) for answer in after]) - expected[CLIENTS:]).max() <= 1e-5


def test_processes_hold_no_library_that_they_do_not_use(service: Service) -> None:
    def holders(library: str) -> set[str]:
        return {
            name
            for name in ("Ingress", "ImageDecoder", "ImageEncoder", "TextEncoder")
            for replica in service.replicas(name)
            if library in Path("/proc", str(replica.pid), "maps").read_text()
        }

    encoders = {"ImageEncoder", "TextEncoder"}
    assert holders("libopenvino") == encoders
    assert holders("libtorch") <= encoders  # to convert a tower, at the first start
    assert holders("pandas") == set()


ENCODER = """
import sys
from deployments.imports import encoder_class
encoder = encoder_class()("tiny", "cpu", towers=("image", "text"))
encoder.encode_texts(["a red circle"])
print(encoder.engine, "torch" in sys.modules)
other = encoder_class()("tiny", "cpu", towers=("text",), engine="torch")
difference = encoder.encode_texts(["a red circle"]).vectors - other.encode_texts(["a red circle"]).vectors
print(other.engine, abs(difference).max() < 1e-5)
"""


def test_an_encoder_whose_towers_are_converted_does_without_torch() -> None:
    done = [
        subprocess.run([sys.executable, "-c", ENCODER], cwd=ROOT, capture_output=True, text=True, timeout=120)
        for _ in range(2)  # the first may have to convert
    ][-1]
    assert done.stdout.split() == ["openvino", "False", "torch", "True"], done.stderr
