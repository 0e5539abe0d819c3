"""CPU replicas that turn image bytes into pixels: the deployment ImageDecoder."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from clipfleet import threads
from clipfleet.checkpoint import find_checkpoint
from clipfleet.decode_process import DecodeProcess
from clipfleet.errors import ClipfleetError, DeadlineExceeded, ImageCrashedDecoder, ImageError
from clipfleet.fingerprint import preprocessing_of
from clipfleet.image_files import ImageLimits, decoding_bytes, open_image
from clipfleet.images import check_size, to_picture
from clipfleet.settings import ServiceSettings
from deployments import logs, memory, tracing
from deployments.metrics import decode_seconds
from deployments.own_config import check_own_scaling

if TYPE_CHECKING:
    from opentelemetry.context import Context

_APART = 2  # images at once, each in a process of its own
_MOST_BYTES_A_PIXEL = 28  # of decoding_bytes, over all formats and modes
_PATIENCE_S, _PAUSE_S = 5.0, 0.05  # of an image that waits for memory in its turn, and between two turns

Pixels = np.ndarray | ClipfleetError  # one image's outcome: (H, W, 3) uint8, or what was wrong


def image_limits(settings: ServiceSettings) -> ImageLimits:
    """The part of the service's settings that concerns one image."""
    limits = settings.limits
    return ImageLimits(
        limits.image_bytes,
        limits.image_pixels,
        limits.image_formats,
        exif_orientation=settings.exif_orientation,
        reduced_jpeg=settings.reduced_jpeg,
    )


class MemoryBudget:
    """Bounds the decoded bytes that a process holds at once; a single larger image still gets its turn, alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._freed = threading.Condition()
        # Of the one that waits for memory: later ones, which may be smaller, do not pass it.
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, size: int, seconds: float | None = None) -> Iterator[None]:
        """Wait until `size` more bytes fit, and hold them. Raises DeadlineExceeded if that takes longer than `seconds`."""
        end = float("inf") if seconds is None else time.monotonic() + seconds
        while not self._take(size, end):
            if time.monotonic() >= end:
                raise DeadlineExceeded("the deadline passed while the image waited to be decoded")
        try:
            yield
        finally:
            with self._freed:
                self._held -= size
                self._freed.notify_all()

    def _take(self, size: int, end: float) -> bool:
        """Wait for a turn, and in it for the memory; not for longer than it should take, since an image may hang."""
        if not self._turn.acquire(timeout=min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)):
            return False
        try:
            with self._freed:
                patience = min(max(0.0, end - time.monotonic()), _PATIENCE_S)
                fits = self._freed.wait_for(lambda: self._held == 0 or self._held + size <= self.limit, patience)
                self._held += size if fits else 0
        finally:
            self._turn.release()
        if not fits:
            time.sleep(_PAUSE_S)  # or this thread would have the next turn as well
        return fits


class DecoderReplica:
    """Decodes images on a pool of threads, so that the event loop stays free."""

    def __init__(self, settings: ServiceSettings) -> None:
        check_own_scaling()
        logs.set_up(settings.log_format)
        tracing.set_up()
        # Damaged files make warnings with numbers of theirs, each another line in the log.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides GPUs from nobody who asks for none
        self._spec = find_checkpoint(settings.model, weights=False).pixels
        self._limits = image_limits(settings)
        self._preprocessing = preprocessing_of(self._spec, exif_orientation=settings.exif_orientation)
        self._budget = MemoryBudget(settings.limits.decoding_bytes)
        self._threads = ThreadPoolExecutor(threads.of_decoder(), "decode", threads.give_way)
        self._apart = ThreadPoolExecutor(_APART, "decode-apart", threads.give_way)
        self._seconds = decode_seconds()
        memory.collect_rarely()
        memory.return_freed()

    async def decode(self, images: Sequence[bytes], deadline: float, preprocessing: str | None = None) -> list[Pixels]:
        """Decode each image to the checkpoint's pixels: one array or error an image, in order.

        `deadline` is wall-clock time; images whose turn comes later are not decoded. Nothing is decoded where the pixels
        that are wanted, by preprocessing_of, are another checkpoint's.
        """
        if preprocessing not in (None, self._preprocessing):
            return []
        loop, trace = asyncio.get_running_loop(), tracing.here()
        work = (loop.run_in_executor(self._threads, self._decode, image, deadline, trace) for image in images)
        return list(await asyncio.gather(*work))

    async def decode_apart(
        self, images: Sequence[bytes], deadline: float, preprocessing: str | None = None
    ) -> list[Pixels]:
        """As decode, in a child process: for images one of which may have ended the replica that held them."""
        if preprocessing not in (None, self._preprocessing):
            return []
        return await asyncio.get_running_loop().run_in_executor(self._apart, self._decode_apart, images, deadline)

    async def probe(self, deadline: float) -> float:
        """Decode one pixel. Returns 0, the seconds since this replica last worked."""
        outcome = (await self.decode([_PROBE], deadline))[0]
        if not isinstance(outcome, np.ndarray):
            raise outcome
        return 0.0

    def _decode(self, data: bytes, deadline: float, trace: Context | None) -> Pixels:
        if time.time() >= deadline:
            return DeadlineExceeded("the deadline passed while the image waited to be decoded")
        began = time.monotonic()
        try:
            with open_image(data, self._limits) as image:
                check_size(image, self._spec, self._limits)  # what is refused waits for no memory
                with self._budget.hold(decoding_bytes(image, self._spec), deadline - time.time()):
                    return to_picture(image, self._spec, self._limits).pixels
        except (ImageError, DeadlineExceeded) as error:
            # Without where it comes from: those frames hold the image until Python's collector comes.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        finally:
            ended = time.monotonic()
            tracing.record("decode an image", trace, began, ended, bytes=len(data))
            if data is not _PROBE:
                self._seconds.observe(max(ended - began, 1e-6))

    def _decode_apart(self, images: Sequence[bytes], deadline: float) -> list[Pixels]:
        child = DecodeProcess(self._spec, self._limits)
        try:
            return [self._decode_in(child, image, deadline) for image in images]
        finally:
            child.close()

    def _decode_in(self, child: DecodeProcess, image: bytes, deadline: float) -> Pixels:
        pixels = np.empty((*self._spec.size, 3), np.uint8)
        # Together at most half of the budget, so that images which may hang leave the other half to the rest: opening one to
        # learn its size may be what ends a process.
        share = min(self._limits.max_pixels * _MOST_BYTES_A_PIXEL, self._budget.limit // (2 * _APART))
        try:
            with self._budget.hold(share, deadline - time.time()):
                left = deadline - time.time()
                # One try: with the replica that died it is the second.
                reply = child.decode_into(image, pixels, timeout_s=left, tries=1) if left > 0 else None
        except DeadlineExceeded as error:
            return error
        if reply is None or (isinstance(reply, ImageCrashedDecoder) and time.time() >= deadline):
            return DeadlineExceeded("the deadline passed while the image was decoded")
        return reply if isinstance(reply, ClipfleetError) else pixels


# A black PNG of one pixel.
_PROBE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)
