"""What the ingress and the decoders export for Prometheus; an encoder's are in encoder.py. Ray adds the prefix `ray_`."""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

# Ray keeps a histogram's buckets alone and makes its sum from their middles, so edges grow by a third: 0.3 ms to 56 s.
SECONDS = [float(f"{10 ** (step / 8):.3g}") for step in range(-28, 15)]


def _tags(*names: str) -> Any:  # Ray's annotation says a tuple of one
    return names


class RequestMetrics:
    """Of one ingress replica."""

    def __init__(self) -> None:
        self._requests = Counter("clipfleet_requests_total", "Requests.", tag_keys=_tags("path", "status"))
        self._seconds = Histogram(
            "clipfleet_request_seconds", "From a request's head to its answer.", SECONDS, tag_keys=_tags("path")
        )
        self._items = Gauge("clipfleet_inflight_items", "Items that the ingress holds.", tag_keys=_tags("tower"))
        self._bytes = Gauge("clipfleet_inflight_bytes", "Bytes of requests that the ingress holds.")

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request; `path` is its route's, so that there are few."""
        self._requests.inc(tags={"path": path, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-6), tags={"path": path})

    def holds(self, images: int, texts: int, size: int) -> None:
        """What is in flight now."""
        self._items.set(images, tags={"tower": "image"})
        self._items.set(texts, tags={"tower": "text"})
        self._bytes.set(size)


def decode_seconds() -> Histogram:
    """Of one decoder replica: the time of a thread for an image, its wait for memory included."""
    return Histogram("clipfleet_decode_seconds", "Time to decode an image.", SECONDS)
