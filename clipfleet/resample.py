"""Pillow's resizing in its compiled form, resample.c: the same pixels sooner.

hatch_build.py compiles it where there is a C compiler. Where it is missing, or does not give the pixels of the Pillow
that is installed, Pillow does the work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipfleet import pixel_memory

LIBRARY = Path(__file__).with_name("_resample.so")
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_ONE_BLOCK = 1 << 30  # bytes

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


def resample(image: Image.Image, size: Size, box: Box, resampling: int) -> np.ndarray | None:
    """Resize an RGB image to `size` and return the part `box` of the result, as uint8 (H, W, 3).

    The pixels are those of `image.resize(size, resampling).crop(box)`. Returns None where the compiled form is missing
    or does not do this. The first call has Pillow keep each image in one block of memory from then on, instead of in
    blocks of 16 MiB (unless PILLOW_BLOCK_SIZE is set): only such memory can be read from outside.
    """
    run = _compiled()
    return None if run is None else run(image, size, box, resampling)


def height_first(size: Size, target: Size) -> bool:
    """Whether Pillow's resize of `size` to `target` runs the pass over the height first."""
    (width, height), (new_width, new_height) = size, target
    return height > new_height and height - new_height > 2 * (width - new_width) and _pillow_reorders_passes()


@cache
def _pillow_reorders_passes() -> bool:
    # Pillow 13 takes the height first where that shrinks the image more (the rule above was found by comparing
    # 1,500 random sizes); older versions always take the width first. One picture tells which this is.
    image = _noise(24, 96)
    width_first = image.resize((8, 96), 3).resize((8, 8), 3)
    return image.resize((8, 8), 3).tobytes() != width_first.tobytes()


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def _compiled() -> Callable[..., np.ndarray | None] | None:
    try:
        function = ctypes.CDLL(str(LIBRARY)).clipfleet_resample_1  # the number changes with the arguments
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 11, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def run(image: Image.Image, size: Size, box: Box, resampling: int, *, plain: bool = False) -> np.ndarray | None:
        if resampling not in _FILTERS or image.mode != "RGB":
            return None
        left, top, right, bottom = box
        width, height = image.size
        result = np.empty((bottom - top, right - left, 3), np.uint8)
        try:
            address, _owner = _memory(image, 4 * width * height)
        except ValueError:
            return None
        done = function(
            address, width, height, *size, left, top, right - left, bottom - top,
            resampling == Image.Resampling.BICUBIC, height_first((width, height), size), plain, result.ctypes.data,
        )  # fmt: skip
        if not done:
            raise MemoryError
        return result

    if not _agrees(run):
        return None
    if "PILLOW_BLOCK_SIZE" not in os.environ:
        Image.core.set_block_size(_ONE_BLOCK)
    return run


class _ArrowArray(ctypes.Structure):
    """The head of the C data interface's ArrowArray (arrow.apache.org, Arrow C data interface)."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _memory(image: Image.Image, size: int) -> tuple[int, Any]:
    """The address of an image's pixels, `size` bytes, 4 each, and what keeps them there.

    ValueError: they do not lie in one block, or otherwise than in the Pillow that this was written for.
    """
    lent = pixel_memory.address(image)
    if lent is not None:
        return lent, image
    owner = image.__arrow_c_array__()  # pyright: ignore[reportAttributeAccessIssue]  # absent from Pillow's own types
    pixels = _ArrowArray.from_address(_pointer(owner[1], b"arrow_array"))  # a list of 4 bytes each
    if (pixels.length * 4, pixels.offset, pixels.n_children) == (size, 0, 1):
        values = pixels.children[0].contents
        if (values.length, values.offset, values.n_buffers) == (size, 0, 2):
            return values.buffers[1], owner
    raise ValueError("another layout")


def _probes() -> Iterator[tuple[Size, Size]]:
    """Sizes and targets: one axis alone, both, smaller, larger, and on either side of where the order of passes changes."""
    yield from (((83, 61), target) for target in ((29, 61), (101, 61), (83, 23), (83, 97), (29, 23), (101, 97)))
    yield from (((40, 90), (30, 90 - shrunk)) for shrunk in (20, 21))
    yield from (((90, 40), target) for target in ((30, 20), (95, 35)))


def _agrees(run: Callable[..., np.ndarray | None]) -> bool:
    try:
        for size, target in _probes():
            image = _noise(*size)
            for resampling in _FILTERS:
                expected = np.asarray(image.resize(target, resampling))
                for plain in (False, True):
                    ours = run(image, target, (0, 0, *target), resampling, plain=plain)
                    if ours is None or not np.array_equal(ours, expected):
                        return False
    except (AttributeError, TypeError):  # a Pillow without Arrow
        return False
    return True
