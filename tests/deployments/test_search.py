"""POST /v1/search over a Qdrant folder: texts, images, rows and weights, filters and pages."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from clipfleet.errors import InvalidRequest, Overloaded
from clipfleet.qdrant import THUMBNAIL, Points
from clipfleet.settings import LimitSettings, SearchSettings
from deployments.schemas import WeightedItem
from deployments.search import Searcher, SearchRoute
from tests.deployments.broken import BROKEN
from tests.deployments.service import ROOT, Service
from tests.library import Library
from tests.test_cli import run


@pytest.fixture
def http(other_service: Service) -> Iterator[httpx.Client]:
    with other_service.client() as client:
        yield client


@pytest.fixture(scope="module")
def images(library: Library, files: list[bytes]) -> np.ndarray:
    """Their vectors (12, d)."""
    return library.images(files)


def image(file: bytes) -> dict[str, Any]:
    return {"image": base64.b64encode(file).decode()}


def search(http: httpx.Client, query: Any, **options: Any) -> list[dict[str, Any]]:
    answer = http.post("/v1/search", json={"query": query, **options})
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["object", "model", "fingerprint", "results"]
    return answer.json()["results"]


def agree(results: list[dict[str, Any]], query: np.ndarray, images: np.ndarray) -> None:
    """The results are all images by their cosine to `query`, best first."""
    cosines = images @ (query / np.linalg.norm(query))
    assert len(results) == len(images)
    assert np.abs(np.array([result["score"] for result in results]) - np.sort(cosines)[::-1]).max() <= 1e-5
    assert all(abs(cosines[int(result["id"][:2])] - result["score"]) <= 1e-5 for result in results)


def test_a_text(http: httpx.Client, library: Library, images: np.ndarray) -> None:
    """By the mean of its templates."""
    both = library.texts(["a purple star", "a picture of a purple star"])
    agree(search(http, "a purple star", limit=12), both.mean(axis=0), images)
    agree(search(http, {"text": "a purple star"}, limit=12), both.mean(axis=0), images)


def test_an_image_finds_itself(http: httpx.Client, files: list[bytes], images: np.ndarray) -> None:
    results = search(http, image(files[3]), limit=12)
    agree(results, images[3], images)
    assert results[0]["id"] == "03.png" and results[0]["score"] > 1 - 1e-5
    assert results[0]["payload"] == {"id": "03.png", "uri": "/pictures/03.png", "width": 33, "height": 20}


def test_more_like_a_row(http: httpx.Client, images: np.ndarray) -> None:
    agree(search(http, {"id": "05.png"}, limit=12), images[5], images)


def test_several_with_weights(http: httpx.Client, library: Library, files: list[bytes], images: np.ndarray) -> None:
    query = [{**image(files[0]), "weight": 2}, {"text": "a red circle", "weight": -0.5}, {"id": "07.png"}]
    text = library.texts(["a red circle", "a picture of a red circle"]).mean(axis=0)
    wanted = 2 * images[0] - 0.5 * text / np.linalg.norm(text) + images[7]
    agree(search(http, query, limit=12), wanted, images)


def test_pages(http: httpx.Client) -> None:
    whole = search(http, "a ring", limit=12)
    pages = [search(http, "a ring", limit=5, offset=offset) for offset in (0, 5, 10, 15)]
    assert [len(page) for page in pages] == [5, 5, 2, 0]
    assert [result for page in pages for result in page] == whole
    assert len(search(http, "a ring")) == 10


def test_a_filter(http: httpx.Client) -> None:
    wide = {"must": [{"key": "width", "range": {"gte": 36}}]}
    assert {result["id"] for result in search(http, "a ring", filter=wide)} == {f"{n:02d}.png" for n in range(6, 12)}
    one = {"must": [{"key": "id", "match": {"value": "04.png"}}]}
    assert [result["id"] for result in search(http, "a ring", filter=one)] == ["04.png"]


def test_thumbnails_when_asked_for(http: httpx.Client) -> None:
    assert THUMBNAIL not in search(http, "a ring")[0]["payload"]
    shown = search(http, "a ring", thumbnails=True)[0]["payload"][THUMBNAIL]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).format == "JPEG"


def test_searches_that_would_only_wait_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = Searcher(SearchSettings(qdrant=str(tmp_path), collection="any"))
    monkeypatch.setattr(Searcher, "_opened", AsyncMock())
    released = threading.Event()

    def slow(_: Points) -> bool:
        return released.wait(20)

    async def many() -> list[bool | BaseException]:
        asked = [asyncio.create_task(searcher.ask(slow, "any", 1, 30)) for _ in range(70)]
        await asyncio.sleep(0.1)
        released.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = asyncio.run(many())
    assert outcomes[:64] == [True] * 64
    assert [type(outcome) for outcome in outcomes[64:]] == [Overloaded] * 6
    assert asyncio.run(searcher.ask(lambda _: True, "any", 1, 30)), "there is room again"


def test_templates_do_not_multiply_a_text_that_is_too_long() -> None:
    requests: Any = SimpleNamespace(limits=LimitSettings(), urls=False)
    parts = [WeightedItem(text="a" * 10**6), WeightedItem(text="a ring")]
    long, short = SearchRoute(requests, None)._inputs(parts, ["a photo of {}"] * 100)
    assert len(long) == 1 and isinstance(long[0], InvalidRequest) and "1,000,000 characters" in str(long[0])
    assert short == ["a photo of a ring"] * 100


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "query"),
        ({"query": []}, 400, "invalid_request", "query"),
        ({"query": ""}, 400, "empty_input", "query"),
        ({"query": {"text": "a", "id": "b"}}, 400, "invalid_request", "query"),
        ({"query": {"id": "absent"}}, 400, "invalid_request", "query"),
        ({"query": [{"text": "a"}, {"id": "absent"}]}, 400, "invalid_request", "query[1]"),
        ({"query": [{"text": "a"}, {"text": "a", "weight": -1}]}, 400, "invalid_request", "query"),
        ({"query": [{"text": "a"}] * 17}, 400, "invalid_request", "query"),
        ({"query": [{"text": "a", "weight": 500}]}, 400, "invalid_request", "query[0]"),
        ({"query": "a", "limit": 0}, 400, "invalid_request", "limit"),
        ({"query": "a", "filters": {}}, 400, "invalid_request", "filters"),
        ({"query": "a", "x" * 1000: 1}, 400, "invalid_request", None),
        ({"query": "a", "limit": 1001}, 400, "invalid_request", "limit"),
        ({"query": "a", "offset": -1}, 400, "invalid_request", "offset"),
        ({"query": "a", "filter": {"mustnt": []}}, 400, "invalid_request", "filter"),
        ({"query": "a", "filter": []}, 400, "invalid_request", "filter"),
        ({"query": "a", "model": "another"}, 404, "model_not_found", "model"),
        ({"query": image(BROKEN["cut PNG"].data)}, 422, "image_corrupt", "query"),
        ({"query": [{"text": "a"}, image(BROKEN["cut PNG"].data)]}, 422, "image_corrupt", "query[1]"),
    ],
)
def test_what_is_refused(http: httpx.Client, body: dict[str, Any], status: int, code: str, param: str | None) -> None:
    answer = http.post("/v1/search", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["param"] == param


def nested(levels: int, leaf: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"must": [leaf]}
    for _ in range(levels):
        found = {"must": [found]}
    return found


CONDITION = {"key": "width", "match": {"value": 33}}


@pytest.mark.parametrize(
    "filter",
    [
        nested(400, CONDITION),
        nested(200, CONDITION),
        nested(100, 1),
        {"must": [CONDITION] * 2000},
        {"must": [1] * 100_000},
        {"must": [{"key": "uri", "match": {"text_any": "word " * 20_000}}]},
        {"must": [{"key": "uri", "match": {"any": ["a" * 100_000]}}]},
        {"must": [{"key": "a[", "match": {"value": 1}}]},
        {"must": [{"key": "", "match": {"value": 1}}]},
        {"min_should": {"conditions": [CONDITION], "min_count": -1}},
        {"must": [{"key": "w" * 2000, "match": {"value": 1}}]},
    ],
    ids=lambda filter: str(filter)[:40],
)
def test_hostile_filters_are_refused(http: httpx.Client, filter: dict[str, Any]) -> None:
    answer = http.post("/v1/search", json={"query": "a ring", "filter": filter})
    assert answer.status_code in (400, 413), answer.text
    assert answer.json()["error"]["code"] in ("invalid_request", "too_many_items")


def test_a_filter_of_some_levels(http: httpx.Client) -> None:
    assert [result["id"] for result in search(http, "a ring", filter=nested(2, CONDITION))] == ["03.png"]


def test_the_limits_of_items_hold_for_all_parts_together(http: httpx.Client, files: list[bytes]) -> None:
    assert len(search(http, [image(file) for file in files[:12]])) == 10
    answer = http.post("/v1/search", json={"query": [image(file) for file in [*files[:12], files[0]]]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_many_items")
    assert answer.json()["error"]["param"] == "query"


def test_a_service_without_a_collection_says_so(service: Service) -> None:
    with service.client() as http:
        answer = http.post("/v1/search", json={"query": "a"})
        assert answer.status_code == 404 and "--index" in answer.json()["error"]["message"]
        assert "/v1/search" not in http.get("/openapi.json").json()["paths"]


def test_a_folder_that_cannot_be_searched_is_refused_at_the_start(collection: Path, tmp_path: Path) -> None:
    index = shutil.copytree(collection, tmp_path / "index")  # a service has the other one open
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["applications"][0]["args"]["exif_orientation"] = False  # other vectors, another fingerprint
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    for file, name, words in (
        ("demo", "drown", "there is no collection 'drown'"),
        (other, "drawn", "holds vectors with fingerprint"),
    ):
        done = run("serve", file, "--index", index, "--collection", name)
        assert done.returncode == 1 and words in done.stderr, done.stderr
