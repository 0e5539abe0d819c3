"""Memory for a photograph's decoded pixels, which each thread keeps and uses again.

Pillow takes new memory for every image, tens of megabytes for a photograph. That costs zeroes which are at once written
over and a page fault for every 4 KiB, and it leaves holes in the heap, which grows while new mixtures of sizes are met
(docs/performance.md has what this saves). A thread keeps what its largest image of late took, until it decodes others or
ends. Only JPEGs get such memory: their decoder writes each pixel or raises an error, so that nothing of the image before can
be seen.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

_MOST = 64 * 2**20  # bytes a thread keeps: 16 megapixels
_UNIT = 2**20
_LOOK_S = 10.0
# Private where that has to be said: shared memory would be a forked child's too, and nothing of it could be given back.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class _Kept(threading.local):
    """What one thread keeps."""

    memory: mmap.mmap | None = None
    address = 0
    lent: object = None  # Pillow's core of the image whose pixels lie there
    needed = 0  # the most bytes that an image took since `looked`
    looked = 0.0

    def room(self, size: int) -> mmap.mmap:
        size = -(-size // _UNIT) * _UNIT
        if self.memory is None or len(self.memory) < size:
            self.memory = None  # before there is more
            self.memory = mmap.mmap(-1, size, **_PRIVATE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.needed = max(self.needed, size)
        return self.memory

    def give_back(self) -> None:
        """Return to the system what none of this thread's images took since this was last done, every 10 s at most."""
        now = time.monotonic()
        if now - self.looked > _LOOK_S:
            if self.memory is not None and len(self.memory) > self.needed and hasattr(mmap, "MADV_DONTNEED"):
                self.memory.madvise(mmap.MADV_DONTNEED, self.needed)
            self.looked, self.needed = now, 0


_kept = _Kept()


@contextmanager
def lend(image: Image.Image) -> Iterator[None]:
    """Have an image that was opened, not loaded, decoded into this thread's memory. Afterwards it has no pixels any more.

    Does nothing to images that are no JPEGs in RGB or take more than 64 MiB, nor inside of another.
    """
    core = None
    if _kept.lent is None:
        _kept.give_back()
        core = _core(image)
    if core is None:
        yield
        return
    try:
        image.im = _kept.lent = core
        yield
    finally:
        image._im = _kept.lent = None  # type: ignore[assignment]  # whoever asks for them gets an error


def _core(image: Image.Image) -> Any:
    """Pillow's image in this thread's memory, or None."""
    size = 4 * image.width * image.height
    if not isinstance(image, JpegImageFile) or image.mode != "RGB" or not image.tile or size > _MOST:
        return None
    if ImageFile.LOAD_TRUNCATED_IMAGES or not _works():  # a truncated one keeps what was there
        return None
    try:
        return _map(_kept.room(size), image)
    except OSError:  # no memory: Pillow says so better
        return None


def _map(memory: mmap.mmap | bytearray, image: Image.Image) -> Any:
    return Image.core.map_buffer(memory, image.size, "raw", 0, ("RGB", 0, 1))


def address(image: Image.Image) -> int | None:
    """Where the pixels of an image, 4 bytes each, lie in this thread's memory; None if they do not."""
    return _kept.address if _kept.lent is not None and getattr(image, "_im", None) is _kept.lent else None


@cache
def _works() -> bool:
    """Whether this Pillow decodes into memory that it is given."""
    try:
        file = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG")
        memory = bytearray(4 * 24 * 40)
        with Image.open(file) as image, Image.open(io.BytesIO(file.getvalue())) as same:
            image.im = _map(memory, image)
            image.load()
            return memory == same.convert("RGBA").tobytes()
    except MemoryError:  # says nothing of Pillow: asked again
        raise
    except Exception:  # whatever another Pillow does here is no fault of the image
        return False
