"""What the routes share: from a request's body to one outcome an item, within its limits and its deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from clipfleet.errors import BodyTooLarge, DeadlineExceeded, InputError, ModelNotFound, ServiceError, Unavailable
from clipfleet.settings import ServiceSettings
from deployments import tracing
from deployments.admission import Admission
from deployments.bodies import Body, parse_json
from deployments.cache import VectorCache
from deployments.encoder import EncodedText
from deployments.fetching import Fetcher
from deployments.gate import KEY_NAME, read_deadline
from deployments.health import Health
from deployments.inputs import ImageUrl, Input
from deployments.metrics import RequestMetrics
from deployments.pipeline import CheckpointChanged, Outcome, Pipeline, seconds_left

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_EXPORT_EVERY_S = 1.0
_WINDOW_S = 10.0
_ENCODERS = {"images": "ImageEncoder", "texts": "TextEncoder"}  # by lane


class Rate:
    """Items a second over the last 10 s."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        self._counts.append((time.monotonic(), count))
        self._forget()

    def now(self) -> float:
        self._forget()
        seconds = min(_WINDOW_S, max(time.monotonic() - self._began, 1.0))
        return sum(count for _, count in self._counts) / seconds

    def _forget(self) -> None:
        while self._counts and self._counts[0][0] < time.monotonic() - _WINDOW_S:
            self._counts.popleft()


@dataclass
class Asked:
    """A request that is being answered. What it holds in memory stays counted until `held` is closed."""

    request: Request
    deadline: float  # wall-clock time
    key: str | None  # the name of the API key that it came with
    held: ExitStack
    size: int = 0  # bytes of its body

    @property
    def seconds_left(self) -> float:
        return seconds_left(self.deadline)


class Requests:
    """The graph as the routes see it, with its limits, its cache and its model."""

    def __init__(self, settings: ServiceSettings, handles: dict[str, DeploymentHandle]) -> None:
        """`handles`: ImageDecoder, ImageEncoder, TextEncoder. Made on the ingress' event loop."""
        self.limits = settings.limits
        self.urls = settings.image_urls.enabled  # whether images may be addresses
        self.health = Health(handles)
        self.admission = Admission(settings.limits, lambda lane: self.health.alone_rate(_ENCODERS[lane]))
        self.rates = {"image": Rate(), "text": Rate()}  # of what was computed
        self._cache = VectorCache(settings.cache)
        self._pipeline = Pipeline(handles["ImageDecoder"], handles["ImageEncoder"], handles["TextEncoder"])
        self._fetcher = Fetcher(settings.image_urls, settings.limits.image_bytes) if self.urls else None

    def export(self, metrics: RequestMetrics) -> None:
        """Keep what is in flight among the metrics."""
        self._exporting = asyncio.create_task(self._export(metrics))

    async def _export(self, metrics: RequestMetrics) -> None:
        while True:
            lanes = self.admission.lanes
            metrics.holds(lanes["images"].items, lanes["texts"].items, self.admission.bytes)
            await asyncio.sleep(_EXPORT_EVERY_S)

    def batches(self) -> dict[str, float | None]:
        """The mean sizes of the encoders' last batches; None before the first."""
        return self._pipeline.batches

    @contextmanager
    def asked(self, request: Request) -> Iterator[Asked]:
        """A request for as long as it is answered."""
        deadline = read_deadline(request, self.limits.deadline_s)
        with ExitStack() as held:
            yield Asked(request, deadline, request.scope.get(KEY_NAME), held)

    async def read_json(self, asked: Asked, kind: type[M]) -> M:
        """The body as `kind`."""
        self.admission.check_key(asked.key, 1)  # before the body is read
        body = await self.in_time(asked, self.body(asked).read())
        asked.size = len(body)
        return parse_json(body, kind, self.limits)

    def body(self, asked: Asked) -> Body:
        """The body, which is still to be read."""
        return Body(asked.request, self.limits, self.admission, asked.held, asked.key)

    async def in_time(self, asked: Asked, reading: Awaitable[T]) -> T:
        """What is read of the request. Raises DeadlineExceeded."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(asked.seconds_left):
                return await reading
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the whole request had arrived") from None
        finally:
            tracing.record("read the request", tracing.here(), began, time.monotonic())

    @property
    def fingerprint(self) -> str | None:
        """Of the model; None while the encoders start."""
        model = self.health.model
        return model["fingerprint"] if model else None

    def check_model(self, wanted: str | None = None) -> dict[str, Any]:
        """The served model. Raises Unavailable while the encoders start, ModelNotFound where another one is wanted."""
        model = self.health.model
        if model is None:
            raise Unavailable("the encoders are still starting", retry_after=2)
        if wanted is not None and wanted != model["id"]:
            raise ModelNotFound(f"model {wanted[:200]!r} is not served here; served is {model['id']!r}", param="model")
        return model

    async def embed(self, asked: Asked, items: Sequence[Input | ImageUrl]) -> tuple[dict[str, Any], list[Outcome]]:
        """The model of now, and one outcome an item by it, in order: fetched, remembered or computed."""
        inputs = await self._fetched(asked, items)
        model = self.check_model()  # it may have changed while the request arrived
        fingerprint = model["fingerprint"]
        known = self._cache.find(inputs, fingerprint)
        missing = [item for number, item in enumerate(inputs) if number not in known]
        computed = await self._compute(asked, missing, model) if missing else []
        self._cache.keep(missing, computed, fingerprint)
        rest = iter(computed)
        return model, [known[number] if number in known else next(rest) for number in range(len(inputs))]

    async def _fetched(self, asked: Asked, items: Sequence[Input | ImageUrl]) -> list[Input]:
        """The items with each address replaced by its image, or by what was wrong with it."""
        addresses = sum(isinstance(item, ImageUrl) for item in items)
        if not addresses:
            return [item for item in items if not isinstance(item, ImageUrl)]
        fetched, most = 0, self.limits.body_bytes

        async def fetch(address: str) -> Input:
            nonlocal fetched
            assert self._fetcher is not None  # otherwise read_items gives no addresses
            try:
                content = await self._fetcher.fetch(address, asked.seconds_left, asked.key)
            except InputError as error:
                return error
            if fetched + len(content) > most:
                raise BodyTooLarge(
                    f"the images of the request's addresses have over {most:,} bytes, which is the limit of a body; "
                    "send fewer a request"
                )
            asked.held.enter_context(self.admission.hold_bytes(len(content), asked.size + fetched, asked.key))
            fetched += len(content)
            return content

        try:
            with self.admission.hold_key(asked.key, addresses):
                async with asyncio.TaskGroup() as group:  # what is refused ends its siblings
                    found = [
                        group.create_task(fetch(item.address)) if isinstance(item, ImageUrl) else item for item in items
                    ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [item.result() if isinstance(item, asyncio.Task) else item for item in found]

    async def _compute(self, asked: Asked, inputs: Sequence[Input], model: dict[str, Any]) -> list[Outcome]:
        images = sum(isinstance(item, bytes) for item in inputs)
        texts = sum(isinstance(item, str) for item in inputs)
        with self.admission.hold_items(images, texts, asked.seconds_left, asked.key) as finish:
            try:
                async with asyncio.timeout(asked.seconds_left):
                    outcomes = await self._pipeline.embed(inputs, asked.deadline, model, finish)
            except CheckpointChanged:
                self.health.forget_model()
                raise
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before every item had its vector") from None
        if done := sum(isinstance(outcome, EncodedText) for outcome in outcomes):
            self.health.succeeded("TextEncoder")
            self.rates["text"].add(done)
        if done := sum(isinstance(outcome, np.ndarray) for outcome in outcomes):
            self.health.succeeded("ImageDecoder", "ImageEncoder")
            self.rates["image"].add(done)
        for outcome in outcomes:
            if isinstance(outcome, ServiceError):  # the model or the deadline failed, not the item
                raise outcome
        return outcomes
