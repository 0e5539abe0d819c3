"""From inputs to vectors: one request's items spread over the decoders and encoders, with retries.

Embedding is idempotent, so a call whose replica dies is made again, to another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from grpc import StatusCode
from grpc.aio import AioRpcError
from loguru import logger
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from clipfleet.errors import ClipfleetError, ServiceError, Unavailable
from deployments.encoder import Encoded, EncodedText
from deployments.inputs import Input

Outcome = np.ndarray | EncodedText | ClipfleetError  # an image's vector (d,), a text's, or what was wrong
T = TypeVar("T")

_IMAGES_A_CALL = 8
_TEXTS_A_CALL = 64
_BYTES_A_CALL = 16 * 1024 * 1024
_PAUSES_S = (0.1, 0.5)
# gRPC's words for "this call cannot work", which a second try would only repeat.
_FINAL_STATUSES = (StatusCode.RESOURCE_EXHAUSTED, StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED)


class CheckpointChanged(Unavailable):
    """A replica has another checkpoint than the one that answers name."""


class ReplicaLost(Exception):
    """A call's replica died or went away before it answered."""


class Pipeline:
    """The graph behind the ingress: handles to the three deployments."""

    def __init__(
        self, decoder: DeploymentHandle, image_encoder: DeploymentHandle, text_encoder: DeploymentHandle
    ) -> None:
        self.decoder = decoder
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.batches: dict[str, float | None] = {"image": None, "text": None}  # the mean sizes that encoders said last

    async def embed(
        self, inputs: Sequence[Input], deadline: float, model: Mapping[str, Any], finish: Callable[[str, int], None]
    ) -> list[Outcome]:
        """One outcome an input, in order, by replicas of that model. `deadline` is wall-clock time; `finish` is called with
        "images" or "texts" and their number whenever some of them are done.

        Raises ServiceError for the whole request; CheckpointChanged where a replica has another checkpoint.
        """
        outcomes: dict[int, Outcome] = {i: item for i, item in enumerate(inputs) if isinstance(item, ClipfleetError)}
        images = {i: len(item) for i, item in enumerate(inputs) if isinstance(item, bytes)}
        texts = [i for i, item in enumerate(inputs) if isinstance(item, str)]
        calls = [
            *(("images", chunk, self._embed_images) for chunk in _spread(images)),
            *(("texts", texts[i : i + _TEXTS_A_CALL], self._embed_texts) for i in range(0, len(texts), _TEXTS_A_CALL)),
        ]

        async def call(what: str, chunk: list[int], embed: Callable[..., Awaitable[list[Outcome]]]) -> list[Outcome]:
            found = await embed([inputs[i] for i in chunk], deadline, model)
            finish(what, sum(not isinstance(outcome, ServiceError) for outcome in found))
            return found

        try:
            async with asyncio.TaskGroup() as group:  # one failed call ends its siblings
                tasks = [(chunk, group.create_task(call(what, chunk, embed))) for what, chunk, embed in calls]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        for chunk, task in tasks:
            outcomes.update(zip(chunk, task.result(), strict=True))
        return [outcomes[i] for i in range(len(inputs))]

    async def _embed_texts(self, texts: list[str], deadline: float, model: Mapping[str, Any]) -> list[Outcome]:
        encoded = await _again(lambda: self.text_encoder.encode.remote(texts, deadline))
        self.batches["text"] = encoded.batch
        return _checked(encoded, model)

    async def _embed_images(self, images: list[bytes], deadline: float, model: Mapping[str, Any]) -> list[Outcome]:
        outcomes = await self._decode(images, deadline, model.get("preprocessing"))
        if not outcomes:
            raise _changed()
        good = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, np.ndarray)]
        if good:
            pixels = [outcomes[i] for i in good]
            encoded = await _again(lambda: self.image_encoder.encode.remote(pixels, deadline))
            self.batches["image"] = encoded.batch
            for i, vector in zip(good, _checked(encoded, model), strict=True):
                outcomes[i] = vector
        return outcomes

    async def _decode(self, images: list[bytes], deadline: float, preprocessing: str | None) -> list[Any]:
        try:
            return await _call(self.decoder.decode.remote(images, deadline, preprocessing))
        except ReplicaLost:
            logger.warning("a decoder died with {} images; trying them in a process of their own", len(images))
        # One of these images may be what killed it, so none goes near another replica's process again.
        return await _again(lambda: self.decoder.decode_apart.remote(images, deadline, preprocessing))


def _changed() -> CheckpointChanged:
    return CheckpointChanged("the service is changing its checkpoint; try again", retry_after=5)


def _checked(encoded: Encoded, model: Mapping[str, Any]) -> list[Outcome]:
    if encoded.fingerprint != model["fingerprint"]:
        raise _changed()
    return encoded.outcomes


def _spread(images: dict[int, int]) -> list[list[int]]:
    """Cut a request's images (place: bytes) into calls: many enough for the decoders, few enough to be cheap, none large."""
    most = min(_IMAGES_A_CALL, -(-len(images) // _IMAGES_A_CALL))
    chunks: list[list[int]] = []
    held = 0
    for index, size in images.items():
        if not chunks or len(chunks[-1]) >= most or held + size > _BYTES_A_CALL:
            chunks.append([])
            held = 0
        chunks[-1].append(index)
        held += size
    return chunks


async def _again(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call of what no replica dies of, up to three times. In between the router has time to learn which one is gone."""
    for pause in _PAUSES_S:
        try:
            return await _call(call())
        except ReplicaLost as lost:
            logger.warning("trying again after: {}", lost)
            await asyncio.sleep(pause)
    try:
        return await _call(call())
    except ReplicaLost as lost:
        raise Unavailable("replicas died while they worked on this request; try again", retry_after=1) from lost


async def _call(response: Awaitable[T]) -> T:
    """Await one call of a replica. Raises ReplicaLost where another replica may succeed, Unavailable where none would."""
    try:
        return await response
    except asyncio.CancelledError as error:
        # Serve also passes on a replica's own cancellation; ours is the one that was asked of this task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the replica cancelled the call") from error
    except (RayActorError, RequestCancelledError) as error:
        raise ReplicaLost(_first_line(error)) from error
    except AioRpcError as error:
        if error.code() in _FINAL_STATUSES:
            logger.error("a call between replicas was refused: {} {}", error.code(), error.details())
            raise Unavailable(f"a call between replicas was refused: {error.code().name}") from error
        raise ReplicaLost(f"{error.code().name}: {error.details()}") from error
    except BackPressureError as error:
        raise Unavailable("every replica's queue is full; try again", retry_after=1) from error
    except DeploymentUnavailableError as error:
        raise Unavailable("a deployment is not available; try again", retry_after=5) from error
    except RayError as error:
        logger.opt(exception=error).error("a replica failed")
        raise Unavailable("a replica failed on this request; try again", retry_after=1) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def seconds_left(deadline: float) -> float:
    """Seconds until the wall-clock `deadline`, never below 0."""
    return max(0.0, deadline - time.time())
