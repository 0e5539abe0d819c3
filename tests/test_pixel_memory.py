"""Photographs are decoded into memory that a thread uses again: the same pixels, and nothing of the image before."""

from __future__ import annotations

import errno
import io
import mmap
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from clipfleet import pixel_memory, resample
from clipfleet.errors import ImageError
from clipfleet.image_files import DEFAULT_LIMITS, ImageLimits, open_image
from clipfleet.images import decode, to_picture
from tests.pictures import encode, picture
from tests.reference import CLIP, reference_pixels, spec_of

SPEC = spec_of(CLIP)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow finds in damaged files

linux = pytest.mark.skipif(platform.system() != "Linux", reason="what is measured is Linux'")


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one:
        yield one


def pillows(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> np.ndarray:
    """The pixels in memory that Pillow takes."""
    with open_image(data, limits) as image:
        return to_picture(image, SPEC, limits, keep=True).pixels


def is_lent(data: bytes) -> bool:
    with open_image(data) as image, pixel_memory.lend(image):
        image.load()
        return pixel_memory.address(image) is not None


def turned(data: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(Image.open(io.BytesIO(data)), "JPEG", exif=exif)


def several_frames() -> bytes:
    """As phones write them: further pictures behind the first."""
    return encode(picture("RGB"), "MPO", save_all=True, append_images=[picture("RGB", 40, 30)])


def test_a_jpeg_is_lent_memory_and_others_are_not(thread: ThreadPoolExecutor) -> None:
    rgb = picture("RGB")
    assert thread.submit(is_lent, encode(rgb, "JPEG")).result()
    assert thread.submit(is_lent, encode(rgb, "JPEG", progressive=True)).result()
    assert open_image(several_frames()).format == "MPO"
    assert thread.submit(is_lent, several_frames()).result()
    for other in (encode(rgb, "PNG"), encode(picture("L"), "JPEG"), encode(picture("CMYK"), "JPEG")):
        assert not thread.submit(is_lent, other).result()


def test_one_image_of_a_thread_is_lent_memory_at_once() -> None:
    data = encode(picture("RGB"), "JPEG")
    with open_image(data) as image, pixel_memory.lend(image):
        image.load()
        assert pixel_memory.address(image) is not None
        before = image.tobytes()
        assert not is_lent(data)
        assert np.array_equal(
            decode(encode(Image.new("RGB", image.size, "white"), "JPEG"), SPEC).pixels, 255 + np.zeros((56, 56, 3))
        )
        assert image.tobytes() == before
        assert pixel_memory.address(image) is not None


def test_what_was_lent_is_no_longer_seen_in_the_image(thread: ThreadPoolExecutor) -> None:
    with open_image(encode(picture("RGB"), "JPEG")) as image:
        to_picture(image, SPEC)
        for use in (image.load, image.tobytes, lambda: decode(image, SPEC)):
            for where in (lambda use: use(), lambda use: thread.submit(use).result()):
                with pytest.raises((OSError, AssertionError, ImageError)):
                    where(use)


def test_more_than_a_thread_may_keep_is_not_lent(thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_memory, "_MOST", 4 * 100 * 100)
    assert thread.submit(is_lent, encode(picture("RGB", 100, 100), "JPEG")).result()
    assert not thread.submit(is_lent, encode(picture("RGB", 101, 100), "JPEG")).result()


def test_the_pixels_are_those_of_pillows_own_memory_on_threads_at_once() -> None:
    rng = random.Random(3)
    files = [
        encode(picture("RGB", rng.randint(1, 900), rng.randint(1, 700)), "JPEG", quality=rng.randint(5, 95))
        for _ in range(24)
    ]
    files.append(several_frames())
    files += [turned(file, orientation) for file, orientation in zip(files, range(1, 9), strict=False)]
    limits = [DEFAULT_LIMITS, ImageLimits(reduced_jpeg=True), ImageLimits(exif_orientation=False)]
    expected = [[pillows(file, each) for each in limits] for file in files]
    together = threading.Barrier(4)

    def work(seed: int) -> None:
        together.wait(60)
        order = [(file, each) for file in range(len(files)) for each in range(len(limits))] * 3
        random.Random(seed).shuffle(order)
        for file, each in order:
            assert np.array_equal(decode(files[file], SPEC, limits[each]).pixels, expected[file][each])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("truncated", [False, True], ids=["refused", "LOAD_TRUNCATED_IMAGES"])
def test_nothing_of_the_image_before_is_seen_in_a_damaged_one(
    thread: ThreadPoolExecutor, truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", truncated)
    white = encode(Image.new("RGB", (160, 120), "white"), "JPEG")
    rng = random.Random(5)

    def damaged() -> Iterator[bytes]:
        for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
            data = encode(picture("RGB", 160, 120), "JPEG", **options)
            for length in range(20, len(data), 61):
                yield data[:length]
                yield data[:length] + b"\xff\xd9"  # ends early, as if it were whole
            for _ in range(200):
                flipped = bytearray(data)
                for _ in range(rng.randint(1, 4)):
                    flipped[rng.randrange(len(data))] = rng.randrange(256)
                yield bytes(flipped)

    def outcome(data: bytes, keep: bool) -> object:
        try:
            with open_image(data) as image:
                return to_picture(image, SPEC, keep=keep).pixels.tobytes()
        except ImageError as error:
            return str(error)

    def compare() -> int:
        decoded = 0
        for data in damaged():
            decode(white, SPEC)
            found = outcome(data, False)
            assert found == outcome(data, True)
            decoded += isinstance(found, bytes)
            assert is_lent(white) is not truncated, "also after an error"
        return decoded

    assert thread.submit(compare).result() > 100, "too few of them decode to show anything"


def test_an_image_of_the_callers_keeps_its_pixels() -> None:
    whole = picture("RGB", 160, 120)
    with Image.open(io.BytesIO(encode(whole, "JPEG"))) as image:
        before = decode(image, SPEC).pixels
        decode(encode(Image.new("RGB", (160, 120), "white"), "JPEG"), SPEC)
        assert np.array_equal(decode(image, SPEC).pixels, before)
        assert np.array_equal(reference_pixels(image, CLIP), before)


NEW_PAGES = """
import ctypes, io, resource
from PIL import Image
from clipfleet.checkpoint import find_checkpoint
from clipfleet.image_files import open_image
from clipfleet.images import to_picture
from deployments import memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few
memory.return_freed()
spec, file = find_checkpoint("tiny").pixels, io.BytesIO()
Image.new("RGB", (3000, 2000)).save(file, "JPEG")  # 23 MB of pixels
for keep in (True, False):
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with open_image(file.getvalue()) as image:
            to_picture(image, spec, keep=keep)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@linux
def test_the_next_image_takes_no_new_memory() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", NEW_PAGES], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    by_pillow, lent = map(int, done.stdout.split())
    assert by_pillow > 20_000_000 / mmap.PAGESIZE, "this test shows nothing: Pillow takes no new memory either"
    resizing = 200_000 if resample.LIBRARY.exists() else 6_000_000  # Pillow's has new memory between its two passes
    assert lent < resizing / mmap.PAGESIZE


def own_mb() -> int:
    return next(
        int(line.split()[1]) // 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


@linux
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_no_image_needs_any_more_is_given_back(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    large, small = encode(Image.new("RGB", (4000, 4000), "white"), "JPEG"), encode(picture("RGB", 200, 100), kind)
    before = own_mb()
    thread.submit(decode, large, SPEC).result()
    thread.submit(decode, small, SPEC).result()
    assert own_mb() > before + 50, "kept for the next one"
    monkeypatch.setattr(pixel_memory, "_LOOK_S", -1.0)
    for _ in range(2):  # of the time before the first, the large one was the largest
        thread.submit(decode, small, SPEC).result()
    assert own_mb() < before + 20
    assert np.array_equal(thread.submit(decode, large, SPEC).result().pixels, pillows(large)), "and taken anew"


def test_without_memory_to_keep_pillow_takes_its_own(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little_memory(number: int, length: int, **options: int) -> mmap.mmap:
        if length > 2**20:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return map_memory(number, length, **options)

    map_memory = mmap.mmap
    small, large = encode(picture("RGB"), "JPEG"), encode(picture("RGB", 700, 500), "JPEG")
    monkeypatch.setattr(mmap, "mmap", little_memory)
    assert not thread.submit(is_lent, large).result()
    assert np.array_equal(thread.submit(decode, large, SPEC).result().pixels, pillows(large))
    assert thread.submit(is_lent, small).result(), "there is enough for this one"


def test_pillow_resizes_what_was_lent_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture("RGB", 300, 200), "JPEG")
    expected = pillows(data)
    monkeypatch.setattr(resample, "_compiled", lambda: None)
    assert np.array_equal(decode(data, SPEC).pixels, expected)


def test_a_pillow_that_decodes_elsewhere_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, thread: ThreadPoolExecutor
) -> None:
    data, lent_memory = encode(picture("RGB"), "JPEG"), pixel_memory._map
    pixel_memory._works.cache_clear()
    try:
        monkeypatch.setattr(pixel_memory, "_map", lambda memory, image: lent_memory(bytearray(memory), image))
        assert not thread.submit(is_lent, data).result()
        assert np.array_equal(decode(data, SPEC).pixels, pillows(data))
    finally:
        pixel_memory._works.cache_clear()


def test_a_pillow_that_does_not_do_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, thread: ThreadPoolExecutor
) -> None:
    class Core:  # stands for a Pillow whose core has no such function
        def __getattr__(self, name: str) -> object:
            if name == "map_buffer":
                raise AttributeError(name)
            return getattr(core, name)

    core, data = Image.core, encode(picture("RGB"), "JPEG")
    pixel_memory._works.cache_clear()
    try:
        monkeypatch.setattr(Image, "core", Core())
        assert not thread.submit(is_lent, data).result()
        assert np.array_equal(decode(data, SPEC).pixels, pillows(data))
    finally:
        pixel_memory._works.cache_clear()
