"""The service that most tests share, and what they send to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.deployments.service import Service, serving


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
