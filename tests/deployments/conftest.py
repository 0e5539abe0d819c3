"""The service that most tests share, and what they send to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

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


@pytest.fixture(scope="session")
def files(pictures: list[Image.Image]) -> list[bytes]:
    """The drawn pictures as PNG bytes."""
    return [encode(picture, "PNG") for picture in pictures]
