"""The pictures in an AVIF are as large as their bitstream says, not as the container says."""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from clipfleet.av1 import Damaged, Frames, Units, frames_of
from clipfleet.avif_boxes import check_pictures
from clipfleet.errors import ImageCorrupt, ImageTooManyPixels
from clipfleet.image_files import ImageLimits, decoding_bytes, open_image
from clipfleet.images import decode
from tests.pictures import encode, picture
from tests.reference import CLIP, spec_of

SPEC = spec_of(CLIP)
LARGE = 10**9


def claiming(data: bytes, width: int, height: int) -> bytes:
    """An AVIF whose container says that it has this size."""
    place = data.index(b"ispe") + 8
    return data[:place] + struct.pack(">II", width, height) + data[place + 8 :]


def bits(*fields: tuple[int, int]) -> bytes:
    """Values of so many bits, one after the other."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def unit(kind: int, payload: bytes) -> bytes:
    return bytes([kind << 3 | 2, len(payload)]) + payload


def sequence(width: int, height: int, deep: bool = False) -> bytes:
    """A header that lets frames have a size of their own, of up to 16 bits."""
    start = [(0, 3), (0, 1), (0, 1), (0, 1), (0, 1), (0, 5), (0, 12), (0, 5)]
    size = [(15, 4), (15, 4), (width - 1, 16), (height - 1, 16)]
    return unit(1, bits(*start, *size, (0, 1), (0, 7), (1, 1), (0, 2), (1, 1), (1, 1), (7, 3), (0, 3), (deep, 1)))


def frame(own_size: bool) -> bytes:
    return unit(6, bits((0, 1), (0, 2), (1, 1), (0, 1), (0, 1), (own_size, 1)))


def test_a_container_that_promises_less_than_its_picture_has() -> None:
    """A file of 1.3 kB decodes to 151 megapixels and says that it has 16 x 16."""
    data = claiming(encode(picture("RGB", 600, 500), "AVIF"), 16, 16)
    assert open_image(data).size == (16, 16)
    assert decoding_bytes(open_image(data)) >= 12 * 600 * 500
    decode(data, SPEC, ImageLimits(max_pixels=300_000))
    with pytest.raises(ImageTooManyPixels, match=r"300,000 pixels.* the limit is 299,999 for one"):
        open_image(data, ImageLimits(max_pixels=299_999))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("frames", [1, 5])
def test_pictures_are_as_large_as_pillow_decodes_them(mode: str, frames: int) -> None:
    images = [picture(mode, 90 + number // 9, 70) for number in range(frames)]
    data = encode(images[0], "AVIF", save_all=True, append_images=images[1:])
    count = (1 + (mode == "RGBA")) * (1 if frames == 1 else 2)  # as an item and as a film
    assert check_pictures(data, LARGE) == count * [Frames(90 * 70, 1, False)]
    decode(data, SPEC)


def with_items(data: bytes, kind: bytes, count: int) -> bytes:
    """An AVIF of this picture and so many items of that kind, all of them in the picture's place."""
    item = data.index(b"iloc")
    start, length = struct.unpack_from(">II", data, item + 18)
    kinds = [b"av01"] + count * [kind]
    numbers = range(1, len(kinds) + 1)
    table = b"".join(struct.pack(">HHHII", number, 0, 1, start, length) for number in numbers)
    entries = b"".join(
        struct.pack(">I4sIHH4sB", 21, b"infe", 2 << 24, number, 0, each, 0)
        for number, each in zip(numbers, kinds, strict=True)
    )
    iloc = struct.pack(">I4sIHH", 16 + len(table), b"iloc", 0, 0x4400, len(kinds)) + table
    iinf = struct.pack(">I4sIH", 14 + len(entries), b"iinf", 0, len(kinds)) + entries
    meta = struct.pack(">I4sI", 12 + len(iloc) + len(iinf), b"meta", 0) + iloc + iinf
    end = data.index(b"meta") - 4
    return data[:end] + data[end:].replace(b"meta", b"free", 1) + meta  # where its data lies stays


def test_all_pictures_together_have_a_limit() -> None:
    data = encode(picture("RGBA", 100, 100), "AVIF")  # and its transparency
    assert check_pictures(data, 10_000) == 2 * [Frames(10_000, 1, False)]
    many = with_items(data, b"av01", 8)
    with pytest.raises(ImageTooManyPixels, match="90,000 or more together"):
        check_pictures(many, 10_000)
    assert len(check_pictures(many, 12_000)) == 9


def test_exif_data_many_times_is_refused_unread() -> None:
    """10,000 of them may lie in one place, with 65,535 tags each."""
    data = encode(picture("RGB", 100, 100), "AVIF")
    assert len(check_pictures(with_items(data, b"Exif", 4), LARGE)) == 1
    with pytest.raises(ImageCorrupt, match="there are more than 4 of EXIF data"):
        check_pictures(with_items(data, b"Exif", 5), LARGE)


def test_a_frame_with_a_size_of_its_own_is_as_large_as_it_may_be() -> None:
    assert frames_of(memoryview(sequence(30, 20) + frame(False)), Units(100)) == (600, 1, False)
    assert frames_of(memoryview(sequence(30, 20) + frame(True)), Units(100)) == (2**32, 1, False)


def test_hidden_frames_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sequence(300, 200, deep=True) + 9 * frame(False)
    assert frames_of(memoryview(stream), Units(100)) == (60_000, 9, True)
    data = encode(picture("RGB", 300, 200), "AVIF")
    monkeypatch.setattr("clipfleet.avif_boxes.frames_of", lambda *_: frames_of(memoryview(stream), Units(100)))
    assert decoding_bytes(open_image(data)) >= (12 + 6 + 8 * 6) * 60_000  # each is kept
    with pytest.raises(ImageTooManyPixels, match=r"540,000 with their hidden frames.* 2 times as much with its frames"):
        open_image(data, ImageLimits(max_pixels=200_000))


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        frame(False),
        sequence(30, 20) + 20 * frame(False),
        sequence(30, 20) + 200 * unit(2, b""),
        sequence(30, 20)[:5],
        unit(1, b"\0"),
        sequence(30, 20) + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=["empty", "no sequence", "endless frames", "endless parts", "cut", "short", "endless size"],
)
def test_what_cannot_be_a_picture_is_damaged(stream: bytes) -> None:
    with pytest.raises(Damaged):
        frames_of(memoryview(stream), Units(100))


def test_an_avif_cut_within_its_picture_is_corrupt() -> None:
    data = encode(Image.new("RGB", (64, 64)), "AVIF")
    with pytest.raises(ImageCorrupt, match="the AVIF's pictures cannot be read: a part is cut off"):
        open_image(data[:-20])
