"""Pillow's resizing in its compiled form, resample.c: the same pixels in a seventh of the time.

hatch_build.py compiles it where there is a C compiler. Where it is missing, or does not give the pixels of the Pillow
that is installed, Pillow does the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LIBRARY = Path(__file__).with_name("_resample.so")
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_ONE_BLOCK = 1 << 30  # bytes

Box = tuple[int, int, int, int]


def resample(
    image: Image.Image, size: tuple[int, int], box: Box, resampling: int, height_first: bool
) -> np.ndarray | None:
    """Resize an RGB image to `size` (width, height) and return the part `box` (left, top, right, bottom) of the result.

    The pixels are those of `image.resize(size, resampling).crop(box)`, as uint8 (H, W, 3). `height_first` says in which
    order Pillow takes its two passes. Returns None where the compiled form is missing or does not do this.
    """
    run = _compiled()
    return None if run is None else run(image, size, box, resampling, height_first)


@cache
def _compiled() -> Callable[..., np.ndarray | None] | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    # Pillow lends out the memory of an image that lies in one block; by default it splits images of over 16 MiB.
    Image.core.set_block_size(_ONE_BLOCK)
    function = library.clipfleet_resample
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 11, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def run(
        image: Image.Image, size: tuple[int, int], box: Box, resampling: int, height_first: bool, plain: bool = False
    ) -> np.ndarray | None:
        if resampling not in _FILTERS or image.mode != "RGB":
            return None
        left, top, right, bottom = box
        result = np.empty((bottom - top, right - left, 3), np.uint8)
        try:
            address, _owner = _memory(image)
        except ValueError:  # not in one block
            return None
        cubic = resampling == Image.Resampling.BICUBIC
        done = function(
            address, *image.size, *size, left, top, right - left, bottom - top, cubic, height_first, plain,
            result.ctypes.data,
        )  # fmt: skip
        if not done:
            raise MemoryError
        return result

    return run if _agrees(run) else None


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


def _memory(image: Image.Image) -> tuple[int, Any]:
    """The address of an image's pixels, 4 bytes each, and what keeps them there. ValueError: not in one block."""
    owner = image.__arrow_c_array__()  # pyright: ignore[reportAttributeAccessIssue]  # absent from Pillow's own types
    array = _ArrowArray.from_address(_pointer(owner[1], b"arrow_array"))
    return array.children[0].contents.buffers[1], owner  # a list of 4 bytes a pixel


def _agrees(run: Callable[..., np.ndarray | None]) -> bool:
    """Whether one pass along each axis, smaller and larger, gives the pixels of this Pillow."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    try:
        for size in ((29, 61), (101, 61), (83, 23), (83, 97)):
            for resampling in _FILTERS:
                for plain in (False, True):
                    ours = run(image, size, (0, 0, *size), resampling, False, plain)
                    if ours is None or not np.array_equal(ours, np.asarray(image.resize(size, resampling))):
                        return False
    except (AttributeError, TypeError):  # another Pillow's Arrow, or none
        return False
    return True
