"""Texts that come again are answered from the ingress' memory; never with another item's vector, never beyond its bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import httpx
import numpy as np

from clipfleet.settings import CacheSettings
from deployments.cache import VectorCache
from deployments.encoder import EncodedText
from tests.deployments.processes import until
from tests.deployments.service import Service
from tests.pictures import encode, picture

_unused = count()


def embed(http: httpx.Client, *items: object) -> np.ndarray:
    answer = http.post("/v1/embeddings", json={"input": list(items)})
    assert answer.status_code == 200, answer.text
    return np.array([entry["embedding"] for entry in answer.json()["data"]], np.float32)


def lookups(service: Service, result: str, tower: str = "text") -> float:
    return service.total("ray_clipfleet_cache_lookups_total", result=result, tower=tower)


def test_a_text_that_comes_again_is_not_computed_again(service: Service, http: httpx.Client) -> None:
    texts = [f"an unheard-of thing, number {next(_unused)}" for _ in range(5)]
    hits, misses = lookups(service, "hit"), lookups(service, "miss")
    first = embed(http, *texts)
    mixed = embed(http, *reversed(texts), "and a new one")
    assert np.array_equal(mixed[:5], first[::-1])
    assert len(np.unique(np.round(mixed, 3), axis=0)) == 6
    until(lambda: lookups(service, "hit") - hits >= 5, 60, "5 hits in the metrics")
    assert (lookups(service, "hit") - hits, lookups(service, "miss") - misses) == (5, 6)


def test_cached_texts_say_again_that_they_were_cut(http: httpx.Client) -> None:
    text = f"{next(_unused)} red circle" * 60
    answers = [http.post("/v1/embeddings", json={"input": text}).json() for _ in range(2)]
    assert answers[0]["data"][0]["truncated"] is True
    assert answers[0] == answers[1]


def settled(count: Callable[[], float]) -> float:
    """A count that has not changed for longer than metrics take to arrive: what came before is in it."""
    while True:
        before = count()
        time.sleep(4)
        if count() == before:
            return before


def test_images_are_computed_each_time_unless_asked_for(
    service: Service, other_service: Service, http: httpx.Client
) -> None:
    files = [encode(picture("RGB", 61 + number, 43), "PNG") for number in range(12)]  # nobody else's

    def post(client: httpx.Client, image: bytes) -> list[float]:
        answer = client.post("/v1/embeddings/images", content=image, headers={"Content-Type": "image/png"})
        return answer.json()["data"][0]["embedding"]

    post(http, files[0])
    assert lookups(service, "hit", "image") == lookups(service, "miss", "image") == 0

    before = settled(lambda: lookups(other_service, "hit", "image"))
    with other_service.client() as client:
        vectors = [[post(client, image) for image in files] for _ in range(2)]
        embed(client, "a red circle"), embed(client, "a red circle")
        assert vectors[0] == vectors[1]
        np.testing.assert_allclose(vectors[0][0], post(http, files[0]), atol=1e-5)
        broken = [client.post("/v1/embeddings/images", content=b"\xff\xd8\xff", headers={"Content-Type": "image/jpeg"})
                  for _ in range(2)]  # fmt: skip
        assert [answer.status_code for answer in broken] == [422, 422]
        until(lambda: lookups(other_service, "hit", "image") - before >= len(files), 60, "hits in the metrics")
        assert lookups(other_service, "hit", "image") - before == len(files)
        assert lookups(other_service, "hit") == 0


def test_the_bound_holds_and_the_least_recent_goes_first() -> None:
    cache = VectorCache(CacheSettings(text_bytes=30_000))
    store = cache._texts
    for number in range(100):
        cache.keep([str(number)], [EncodedText(np.full(512, number, np.float32), False, 3)], "one")
        assert number < 7 or cache.find(["7"], "one")  # looked at each time, so it stays
    assert 25_000 < store.bytes <= 30_000
    found = {number for number in range(100) if cache.find([str(number)], "one")}
    assert found == {7} | set(range(100 - len(found) + 1, 100))
    for number in found:
        outcome = cache.find([str(number)], "one")[0]
        assert isinstance(outcome, EncodedText) and outcome.vector[0] == number
    assert cache.find(["7"], "another") == {}, "another checkpoint's vectors are never a hit"
