"""The actors that hold the model: pixels in, an output file written, its counts out."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from clipfleet.errors import FingerprintMismatch
from clipfleet.fingerprint import fingerprint
from clipfleet.qdrant import Collection, Points
from deployments.imports import encoder_class
from jobs.decoding import unpack
from jobs.destination import Claim
from jobs.parts import Origin, write

if TYPE_CHECKING:
    from clipfleet.encoder import Encoder


_THUMBNAIL = (160, 160)  # pixels; some 5 kB in base64


@dataclass(frozen=True)
class EncodePlan:
    """What an encoder has to know. `threads` are those of a CPU, `points` is the Qdrant collection to fill, if any, with
    `thumbnails` or without."""

    claim: Claim
    origin: Origin
    format: str
    points: Collection | None
    model: str
    device: str
    batch_size: int
    threads: int
    thumbnails: bool = False


class EncodeActor:
    """One model on one device, for the whole job."""

    def __init__(self, plan: EncodePlan) -> None:
        self._plan = plan
        self._failure: Exception | None = None
        self._points: Points | None = None
        try:
            self._encoder = _load(plan)
            if plan.points is not None:
                self._points = Points(plan.points)
                self._points.prepare(self._encoder.dimension, plan.origin.fingerprint)
        except Exception as error:  # of an actor that does not start, Ray would keep the text alone
            self._failure = error
        self._ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode and write each row of decode_tasks. Returns (rows, failed, when this encoder was ready) of each."""
        if self._failure is not None:
            raise self._failure
        return pa.Table.from_pylist([self._write(row, batch) for row in range(batch.num_rows)])

    def _write(self, row: int, batch: pa.Table) -> dict[str, float]:
        rows, pixels = unpack(row, batch, self._encoder.checkpoint.pixels.size)
        size = self._plan.batch_size
        vectors = [self._encoder.encode_pixels(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        joined = np.concatenate([np.zeros((0, self._encoder.dimension), np.float32), *vectors])  # (k, d)
        if self._points is not None:
            self._points.upload(rows, joined, list(map(thumbnail, pixels)) if self._plan.thumbnails else ())
        write(self._plan.claim, self._plan.origin, self._plan.format, rows, joined)
        return {"rows": rows.num_rows, "failed": rows.num_rows - len(pixels), "ready": self._ready}


def thumbnail(pixels: np.ndarray) -> str:
    """A small JPEG, in base64, of what the model sees (H, W, 3)."""
    picture = Image.fromarray(pixels)
    picture.thumbnail(_THUMBNAIL)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def _load(plan: EncodePlan) -> Encoder:
    origin = plan.origin
    encoder = encoder_class()(  # imported here, because the job's own process needs none of it
        plan.model, plan.device, origin.precision, towers=("image",), engine=origin.engine, threads=plan.threads
    )
    found = fingerprint(encoder.checkpoint)
    if found != plan.origin.fingerprint:
        raise FingerprintMismatch(
            f"{plan.model} has fingerprint {found} on this node and {plan.origin.fingerprint} where the job started"
        )
    return encoder
