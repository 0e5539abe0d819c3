"""Under configs/autoscale.yaml load brings a second decoder, and quiet takes it away."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.deployments.processes import until
from tests.deployments.service import Service, serving
from tests.pictures import encode

CLIENTS = 24


@pytest.fixture(scope="module")
def autoscaling() -> Iterator[Service]:
    with serving("autoscale") as service:
        yield service


def slow_to_decode() -> bytes:
    """A PNG of 9 megapixels: a quarter of a second for a decoder, a few kB for the network."""
    return encode(Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (3000, 12))), "PNG")


def test_a_second_decoder_comes_with_load_and_goes_without(autoscaling: Service) -> None:
    body = slow_to_decode()
    stop = threading.Event()
    statuses: set[int] = set()

    def client() -> None:
        with autoscaling.client(headers={"Content-Type": "image/png"}) as http:
            while not stop.is_set():
                statuses.add(http.post("/v1/embeddings/images", content=body).status_code)

    def decoders() -> int:
        return len(autoscaling.replicas("ImageDecoder"))

    assert decoders() == 1
    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        until(lambda: decoders() == 2, 120, "two decoders under load")
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    until(lambda: decoders() == 1, 120, "one decoder without load")
    assert statuses == {200}
    assert httpx.get(f"{autoscaling.url}/readyz", trust_env=False).status_code == 200
