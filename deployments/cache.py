"""Vectors that were computed before, found again by what they were computed from.

Queries repeat in search traffic, pictures hardly ever do: texts are kept by default, images only if asked for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.serve.metrics import Counter

from clipfleet.settings import CacheSettings
from deployments.encoder import EncodedText
from deployments.inputs import Input
from deployments.pipeline import Outcome

_Key = tuple[str, bytes]  # fingerprint, digest of the content
_ENTRY_BYTES = 600  # of Python's objects around a vector


class Store:
    """The outcomes of one kind of input, the least recently used dropped first. 0 bytes hold nothing."""

    def __init__(self, limit: int, tower: str) -> None:
        self.limit = limit
        self.bytes = 0
        self._outcomes: OrderedDict[_Key, Outcome] = OrderedDict()
        tags: Any = ("tower", "result")  # Ray's annotation says a tuple of one
        self._lookups = Counter("clipfleet_cache_lookups_total", "Items looked up in the cache.", tag_keys=tags)
        self._lookups.set_default_tags({"tower": tower})

    def find(self, key: _Key) -> Outcome | None:
        outcome = self._outcomes.get(key)
        self._lookups.inc(tags={"result": "miss" if outcome is None else "hit"})
        if outcome is not None:
            self._outcomes.move_to_end(key)
        return outcome

    def keep(self, key: _Key, outcome: Outcome) -> None:
        size = _size(outcome)
        if key in self._outcomes or size > self.limit:
            return
        self._outcomes[key] = outcome
        self.bytes += size
        while self.bytes > self.limit:
            _, dropped = self._outcomes.popitem(last=False)
            self.bytes -= _size(dropped)


def _size(outcome: Outcome) -> int:
    vector = outcome.vector if isinstance(outcome, EncodedText) else outcome
    assert isinstance(vector, np.ndarray)
    return vector.nbytes + _ENTRY_BYTES


class VectorCache:
    """One ingress replica's cache. A key holds the fingerprint and a SHA-256 of the whole content, so a hit is never another
    item's vector, nor another checkpoint's."""

    def __init__(self, settings: CacheSettings) -> None:
        self._texts = Store(settings.text_bytes, "text")
        self._images = Store(settings.image_bytes, "image")

    def find(self, inputs: Sequence[Input], fingerprint: str) -> dict[int, Outcome]:
        """The outcomes that are known, by their place in `inputs`."""
        found: dict[int, Outcome] = {}
        for number, item in enumerate(inputs):
            store = self._store(item)
            if store is not None and (outcome := store.find(_key(item, fingerprint))) is not None:
                found[number] = outcome
        return found

    def keep(self, inputs: Sequence[Input], outcomes: Sequence[Outcome], fingerprint: str) -> None:
        """Remember what was computed; errors are not kept."""
        for item, outcome in zip(inputs, outcomes, strict=True):
            store = self._store(item)
            if store is None:
                continue
            # Copies: what comes from an encoder may be a view of a whole message.
            if isinstance(outcome, EncodedText):
                store.keep(_key(item, fingerprint), outcome._replace(vector=np.array(outcome.vector)))
            elif isinstance(outcome, np.ndarray):
                store.keep(_key(item, fingerprint), np.array(outcome))

    def _store(self, item: Input) -> Store | None:
        store = self._texts if isinstance(item, str) else self._images if isinstance(item, bytes) else None
        return store if store is not None and store.limit else None


def _key(item: Input, fingerprint: str) -> _Key:
    content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
    assert isinstance(content, bytes)
    return fingerprint, hashlib.sha256(content).digest()
