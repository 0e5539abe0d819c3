"""The service that most tests share, and the library that its vectors are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from clipfleet.encoder import Encoder
from clipfleet.images import decode
from tests.deployments.service import Service, serving
from tests.pictures import encode


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """The tiny checkpoint under configs/demo.yaml; stopped by SIGTERM, with nothing left, when all tests are through."""
    with serving("demo") as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A client of the shared service."""
    with service.client() as client:
        yield client


class Library:
    """The tiny checkpoint in this process."""

    def __init__(self) -> None:
        self._encoder = Encoder("tiny", "cpu")

    def images(self, files: list[bytes]) -> np.ndarray:
        """Vectors (n, d) of encoded images."""
        return self._encoder.encode_pixels(
            np.stack([decode(data, self._encoder.checkpoint.pixels)[0] for data in files])
        )

    def texts(self, texts: list[str]) -> np.ndarray:
        """Vectors (n, d) of texts."""
        return self._encoder.encode_texts(texts).vectors


@pytest.fixture(scope="session")
def library() -> Library:
    return Library()


@pytest.fixture(scope="session")
def files(pictures: list[Image.Image]) -> list[bytes]:
    """The drawn pictures as PNG bytes."""
    return [encode(picture, "PNG") for picture in pictures]
