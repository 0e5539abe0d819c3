"""GPU (or CPU) replicas that run one tower of a checkpoint: the deployments ImageEncoder and TextEncoder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ray import serve
from ray.serve.metrics import Counter, Histogram

from clipfleet import threads
from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint, preprocessing_of
from clipfleet.settings import BatchSettings, ServiceSettings, parse
from deployments import logs, memory, tracing
from deployments.batching import Batcher
from deployments.imports import encoder_class
from deployments.metrics import SECONDS
from deployments.own_config import own_batching

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from clipfleet.encoder import Tower

# Ray keeps a histogram's buckets alone and makes its sum from their middles. With an edge on either side of a size the
# sum is exact, here for every size up to 32 and for the usual larger ones.
_BATCH_SIZES = [size + 0.5 for size in (*range(33), 47, 48, 63, 64, 95, 96, 127, 128, 255, 256)]


class EncodedText(NamedTuple):
    """One text's outcome."""

    vector: np.ndarray  # (d,) float32
    truncated: bool
    tokens: int


class Encoded(NamedTuple):
    """What an encoder answers: its checkpoint's fingerprint, and a vector (d,), EncodedText or ClipfleetError an item.

    `batch` is the mean size of its last batches; None before the first.
    """

    fingerprint: str
    outcomes: list[Any]
    batch: float | None = None


class EncoderReplica:
    """One tower on one device. Its model has run once before the replica counts as running."""

    def __init__(self, tower: Tower, settings: ServiceSettings) -> None:
        batch = own_batching()  # before weights are loaded: a refusal should be quick
        logs.set_up(settings.log_format)
        tracing.set_up()
        memory.return_freed()
        own_threads = threads.of_encoder(settings.cpus_per_replica, settings.threads_per_replica)
        self._tower = tower
        self._settings = settings
        checkpoint = find_checkpoint(settings.model)
        # Imported here, because the ingress and the graph's builder import this module too.
        self._encoder = encoder_class()(
            checkpoint,
            settings.device,
            settings.precision,
            towers=(tower,),
            engine=settings.engine,
            threads=own_threads,
        )
        self._fingerprint = fingerprint(checkpoint, exif_orientation=settings.exif_orientation)
        self._preprocessing = preprocessing_of(checkpoint.pixels, exif_orientation=settings.exif_orientation)
        self._forward(self._probe_items())  # the first pass is the slow one
        self._alone_s = min(self._pass_alone() for _ in range(5))  # others start beside it
        self._mean_batch: float | None = None
        self._batcher = Batcher(self._forward, batch, self._observe, settings.limits.forward_s)
        memory.collect_rarely()

        tags = {"tag_keys": ("tower",)}
        self._batch_size = Histogram("clipfleet_batch_size", "Items in a batch.", _BATCH_SIZES, **tags)
        self._queue_wait = Histogram("clipfleet_queue_wait_seconds", "Wait of an item for the model.", SECONDS, **tags)
        self._forward_time = Histogram("clipfleet_forward_seconds", "Time of a forward pass.", SECONDS, **tags)
        self._items = Counter("clipfleet_items_total", "Items that were encoded.", **tags)
        for metric in (self._batch_size, self._queue_wait, self._forward_time, self._items):
            metric.set_default_tags({"tower": tower})

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a new batch size and wait while running."""
        self._batcher.settings = parse(BatchSettings, user_config, "user_config")

    # Serve's own batch has no wait and stays small: it only hands calls that arrived together to the batcher,
    # which joins everything that waits when the model falls free. 8 x 32 is max_ongoing_requests.
    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0, max_concurrent_batches=32)
    async def _together(
        self, calls: list[tuple[Sequence[Any], float, Context | None]]
    ) -> list[asyncio.Future[list[Any]]]:
        # Futures, so that a short call does not wait for a long one that happened to arrive with it.
        return [self._batcher.enqueue(items, deadline, trace=trace) for items, deadline, trace in calls]

    async def encode(self, items: Sequence[Any], deadline: float) -> Encoded:
        """Encode pixels (uint8 (H, W, 3) each) or texts."""
        outcomes = await (await self._together((items, deadline, tracing.here())))
        return Encoded(self._fingerprint, outcomes, self._mean_batch)

    async def probe(self, deadline: float) -> float:
        """Seconds since this replica's model last returned; runs it once if that is more than 2 s."""
        if self._idle_seconds() > 2:
            await self._batcher.submit(self._probe_items(), deadline, quiet=True)
        return self._idle_seconds()

    async def describe(self) -> dict[str, Any]:
        """What /v1/models says about the checkpoint, and what ranking needs; seconds of a pass of one item."""
        encoder = self._encoder
        return {
            "id": self._settings.served_model_name or encoder.checkpoint.served_name,
            "revision": encoder.checkpoint.revision,
            "dimension": encoder.dimension,
            "context_length": encoder.context_length,
            "image_size": encoder.image_size,
            "fingerprint": self._fingerprint,
            "preprocessing": self._preprocessing,
            "precision": encoder.precision,
            "engine": encoder.engine,
            "logit_scale": encoder.logit_scale,
            "logit_bias": encoder.logit_bias,
            "alone_s": self._alone_s,
        }

    def _idle_seconds(self) -> float:
        last = self._batcher.last_success
        return float("inf") if last is None else time.monotonic() - last

    def _probe_items(self) -> list[Any]:
        size = self._encoder.image_size
        return [np.zeros((size, size, 3), np.uint8)] if self._tower == "image" else ["probe"]

    def _pass_alone(self) -> float:
        """Seconds of a pass of one item."""
        began = time.monotonic()
        self._forward(self._probe_items())
        return time.monotonic() - began

    def _forward(self, items: list[Any]) -> Sequence[Any]:
        if self._tower == "image":
            return list(self._encoder.encode_pixels(np.stack(items)))  # (n, d) float32
        encoded = self._encoder.encode_texts(items)
        return [EncodedText(*row) for row in zip(encoded.vectors, encoded.truncated, encoded.tokens, strict=True)]

    def _observe(self, size: int, waits: Sequence[float], forward: float) -> None:
        mean = self._mean_batch
        self._mean_batch = float(size) if mean is None else 0.9 * mean + 0.1 * size
        self._batch_size.observe(size)
        self._forward_time.observe(forward)
        self._items.inc(size)
        for wait in waits:
            self._queue_wait.observe(max(wait, 1e-6))
