"""Images by address through a whole service that fetches from one network beside the internet's."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from tests.deployments.listener import Listener, listening
from tests.deployments.service import Service
from tests.deployments.test_http_embeddings import as_image, post, refused, vectors
from tests.library import Library


@pytest.fixture
def http(other_service: Service) -> Iterator[httpx.Client]:
    with other_service.client() as client:
        yield client


@pytest.fixture
def address(image_store: Listener, files: list[bytes]) -> str:
    image_store.image = files[0]
    return f"http://127.0.0.9:{image_store.port}"


@pytest.fixture
def forbidden(image_store: Listener) -> Iterator[Listener]:
    """A web server at the port that is fetched from, but on another address of this machine."""
    with listening("127.0.0.1", image_store.port) as server:
        yield server


def test_a_request_that_mixes_addresses_and_content(
    http: httpx.Client, address: str, library: Library, files: list[bytes]
) -> None:
    items = ["a red circle", {"image": f"{address}/image"}, as_image(files[1]), {"image": f"{address}/hop2"}]
    found = vectors(post(http, input=items))
    assert np.abs(found[[1, 2, 3]] - library.images([files[0], files[1], files[0]])).max() <= 1e-5
    assert np.abs(found[0] - library.texts(["a red circle"])[0]).max() <= 1e-5
    alone = vectors(post(http, input=f"{address}/image", modality="image"))
    assert np.abs(alone - found[1]).max() <= 1e-5


def test_ranking_by_address(http: httpx.Client, address: str, files: list[bytes]) -> None:
    candidates = [as_image(files[1]), {"image": f"{address}/image"}]
    answer = http.post("/v1/rank", json={"query": as_image(files[0]), "candidates": candidates})
    assert answer.json()["results"][0] == {
        "index": 1,
        "score": pytest.approx(1, abs=1e-5),
        "probability": pytest.approx(1, abs=0.1),
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_unasked(http: httpx.Client, forbidden: Listener, host: str) -> None:
    item = {"image": f"http://{host}:{forbidden.port}/image"}
    refused(post(http, input=["a text", item]), 400, "image_url_forbidden", "input[1]")
    assert forbidden.connections == 0


def test_a_redirect_to_loopback_is_not_followed(
    http: httpx.Client, address: str, image_store: Listener, forbidden: Listener
) -> None:
    came = image_store.connections
    item = {"image": f"{address}/to?http://127.0.0.1:{forbidden.port}/image"}
    answer = http.post("/v1/rank", json={"query": "a", "candidates": [item]})
    refused(answer, 400, "image_url_forbidden", "candidates[0]")
    assert (image_store.connections - came, forbidden.connections) == (1, 0)


def test_each_address_has_an_outcome_of_its_own(http: httpx.Client, address: str, files: list[bytes]) -> None:
    wanted = {
        f"{address}/image": None,
        f"{address}/absent": "image_not_fetched",
        f"{address}/html": "image_not_fetched",
        f"{address}/lying": "image_too_many_bytes",
        "http://127.0.0.9:22/image": "image_url_forbidden",
        "http://169.254.169.254/latest/meta-data/": "image_url_forbidden",
    }
    answer = post(http, input=[{"image": item} for item in wanted], on_error="partial")
    rows = answer.json()["data"]
    assert [row.get("error", {}).get("code") for row in rows] == list(wanted.values())
    assert rows[0]["embedding"] and answer.status_code == 200
