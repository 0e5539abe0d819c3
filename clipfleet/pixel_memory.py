"""Memory for a photograph's decoded pixels, which each thread keeps and uses again.

Pillow takes new memory for every image, tens of megabytes for a photograph. That costs zeroes which are at once written
over and a page fault for every 4 KiB, together an eighth of the time of decoding, and it leaves holes in the heap, which
therefore grows for as long as new mixtures of sizes are met. Only JPEGs get such memory: their decoder writes each pixel or
raises an error, so that nothing of the image before can be seen.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import threading
import time
from functools import cache

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

_MOST = 64 * 2**20  # bytes a thread keeps: 16 megapixels
_UNIT = 2**20
_LOOK_S = 10.0
# Private memory, where that has to be said: of shared memory nothing can be given back.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class _Kept(threading.local):
    """What one thread keeps."""

    memory: mmap.mmap | None = None
    address = 0
    lent: object = None  # Pillow's core of the image whose pixels lie there
    needed = 0  # bytes, at most, since it was last looked
    looked = 0.0

    def room(self, size: int) -> mmap.mmap:
        self.lent = None
        self.needed = max(self.needed, -(-size // _UNIT) * _UNIT)
        if self.memory is None or len(self.memory) < self.needed:
            self.memory = None  # before there is more
            self.memory = mmap.mmap(-1, self.needed, **_PRIVATE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._give_back(self.memory)
        return self.memory

    def _give_back(self, memory: mmap.mmap) -> None:
        """Return what no image has needed for ten seconds or more to the system."""
        now = time.monotonic()
        if now - self.looked > _LOOK_S:
            if len(memory) > self.needed and hasattr(mmap, "MADV_DONTNEED"):
                memory.madvise(mmap.MADV_DONTNEED, self.needed)
            self.looked, self.needed = now, 0


_kept = _Kept()


def lend(image: Image.Image) -> None:
    """Have an opened image decoded into this thread's memory, where its pixels stay until the thread's next image.

    Does nothing to images that are no JPEGs in RGB, are decoded already or take more than 64 MiB.
    """
    size = 4 * image.width * image.height
    if isinstance(image, JpegImageFile) and image.mode == "RGB" and image.tile and size <= _MOST and _works():
        _lend(image, size)


def _lend(image: Image.Image, size: int) -> None:
    try:
        core = Image.core.map_buffer(_kept.room(size), image.size, "raw", 0, ("RGB", 0, 1))
    except OSError:  # no memory: Pillow says so better
        return
    image.im = _kept.lent = core


def address(image: Image.Image) -> int | None:
    """Where the pixels of an image, 4 bytes each, lie in this thread's memory; None if they do not."""
    return _kept.address if _kept.lent is not None and image.im is _kept.lent else None


@cache
def _works() -> bool:
    """Whether this Pillow decodes into memory that it is given."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    try:
        with Image.open(file) as image, Image.open(file) as same:
            _lend(image, 4 * image.width * image.height)
            image.load()
            at = address(image)
            return at is not None and ctypes.string_at(at, 4 * 24 * 40) == same.convert("RGBA").tobytes()
    except (AttributeError, TypeError, ValueError):
        return False
