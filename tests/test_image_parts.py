"""Small files that would take a decoder long or much memory by their many parts: refused before that."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clipfleet.errors import ImageCorrupt, ImageTooManyPixels
from clipfleet.image_files import open_image
from clipfleet.images import decode
from tests.pictures import TiffEntry, encode, picture, tiff
from tests.reference import CLIP, spec_of

SPEC = spec_of(CLIP)

# Pillow warns about what it finds in damaged files, in words of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def is_decoded(data: bytes) -> bool:
    """Raises an ImageError where it is not."""
    return decode(data, SPEC).pixels.shape == (56, 56, 3)


def test_a_jpeg_of_endless_scans_is_refused_unread() -> None:
    """A scan of 95 bytes may touch all 64 million pixels: 20 MiB of them would take hours."""
    data = encode(picture("L", 640, 480), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan, end = data[start:-2], data[-2:]
    assert is_decoded(data[:start] + 20 * scan + end)
    with pytest.raises(ImageCorrupt, match=r"scans; the limit is 100"):
        decode(data[:start] + 200 * scan + end, SPEC)


def test_what_phones_and_cameras_add_to_a_jpeg_does_not_count() -> None:
    """Films behind a motion photo's end, and thumbnails in its segments, hold the bytes that start a scan."""
    data = encode(picture("RGB", 300, 200), "JPEG")
    segment = b"\xff\xe5" + struct.pack(">H", 2 + 600) + 300 * b"\xff\xda"
    with_both = data[:2] + segment + data[2:] + 500 * b"film\xff\xda"
    assert np.array_equal(decode(with_both, SPEC).pixels, decode(data, SPEC).pixels)


@pytest.mark.parametrize(
    ("part", "times", "message"),
    [
        (b"\xff\xe1\0\x08Exif\0\0", 10_000, "more than 10 segments of EXIF data"),  # Pillow joins these: quadratic
        (b"\xff\xe5\0\x02", 10_000, "more than 500 segments before its pixels"),
        (b"\xff\xfe\0\0", 10_000, "more than 500 segments before its pixels"),  # the least length, and one below it
        (b"\xff\xdb\0\1", 10_000, "more than 500 segments before its pixels"),
        (b"\xff", 200_000, "more than 100,000 bytes of tables and fill"),
        (b"\xff\0", 100_000, "more than 100,000 bytes of tables and fill"),
        (b"\xff\xd0", 100_000, "more than 100,000 bytes of tables and fill"),
        (b"\xff\xf0", 100_000, "more than 100,000 bytes of tables and fill"),
        (b"\xff\xdb" + struct.pack(">H", 65_002) + 1000 * bytes(65), 2, "more than 100,000 bytes of tables and fill"),
    ],
)
def test_a_jpeg_of_endless_segments_is_refused_unread(part: bytes, times: int, message: str) -> None:
    """Pillow takes a step of Python for each: 20 MiB of them would take minutes."""
    data = encode(picture("RGB", 60, 40), "JPEG")
    with pytest.raises(ImageCorrupt, match=message):
        open_image(data[:2] + times * part + data[2:])


def test_a_jpeg_may_have_much_metadata_and_some_fill() -> None:
    data = encode(picture("RGB", 60, 40), "JPEG", icc_profile=255 * bytes(65519), comment=b"words")
    assert data.count(b"ICC_PROFILE") == 255
    xmp = b"\xff\xe1\0\x12" + b"http://ns.adobe."
    assert is_decoded(data[:2] + 100 * xmp + 1000 * b"\xff" + data[2:])


def test_a_png_of_endless_chunks_is_refused_unread() -> None:
    data = encode(picture("RGB", 30, 20), "PNG")
    chunk = struct.pack(">I", 0) + b"teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    assert is_decoded(data[:33] + 100 * chunk + data[33:])
    with pytest.raises(ImageCorrupt, match="more than 10,000 chunks"):
        decode(data[:33] + 20_000 * chunk + data[33:], SPEC)


def test_a_png_whose_pixels_come_in_crumbs_is_refused_unread() -> None:
    """Pillow takes two steps of Python for each: 19 MB of single bytes took two seconds."""
    header, rows = encode(Image.new("L", (100, 300)), "PNG")[:33], zlib.compress(bytes(101 * 300), 0)

    def in_pieces(size: int) -> bytes:
        pieces = (b"IDAT" + rows[start : start + size] for start in range(0, len(rows), size))
        chunks = (struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in pieces)
        return header + b"".join(chunks) + struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))

    assert is_decoded(in_pieces(256))
    assert is_decoded(in_pieces(20))
    with pytest.raises(ImageCorrupt, match="more than 10,000 chunks beside its pixels, or tiny ones"):
        open_image(in_pieces(2))


@pytest.mark.parametrize(
    "part",
    [
        b"!\xfe" + 60_000 * b"\2ab" + b"\0",  # a comment
        50_000 * b"!\xfe\0",
        b"!\xff\x0bNETSCAPE2.0\0" + 110_000 * b"\1," + b"\0",
        b"!\x01\0" + 110_000 * b"\1," + b"\0",  # Pillow reads on behind the empty block
        110_000 * b"x",
    ],
    ids=["comment", "comments", "application", "unknown", "junk"],
)
def test_a_gif_of_endless_blocks_is_refused_unread(part: bytes) -> None:
    """Pillow takes a step of Python for each, and keeps a comment's: 20 MiB of them take 850 MB."""
    data = encode(picture("P", 30, 20), "GIF")
    start = 13 + (6 << (data[10] & 7))
    assert data[start : start + 1] in (b",", b"!")
    assert is_decoded(data[:start] + b"!\xfe\3abc\0" + b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0" + data[start:])
    with pytest.raises(ImageCorrupt, match="more than 100,000 blocks"):
        open_image(data[:start] + part * 2 + data[start:])


def grey(width: int, height: int, compression: int = 1) -> list[TiffEntry]:
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]


def test_a_tiff_whose_tile_is_larger_than_the_image() -> None:
    tile = zlib.compress(bytes(16384 * 16384))
    entries = [*grey(100, 100, 8), (322, 4, 1, 16384), (323, 4, 1, 16384), (324, 4, 1, 0), (325, 4, 1, len(tile))]
    with pytest.raises(ImageTooManyPixels, match="a tile of the TIFF has 16384 x 16384"):
        decode(tiff(entries, tile), SPEC)


def test_a_tiff_whose_tiles_reach_far_beyond_the_image() -> None:
    """Pillow decodes all of each tile: 20 of 64 megapixels took 2.6 s, and 62 kB may hold a thousand that lie in one place."""
    tile = zlib.compress(bytes(8000 * 100))
    tiles = [(322, 4, 1, 8000), (323, 4, 1, 100)]

    def column(height: int) -> bytes:
        count, end = height // 100, len(tiff([*grey(1, height, 8), *tiles, (324, 4, 2, 0), (325, 4, 2, 0)], b""))
        places, sizes = struct.pack(f"<{count}I", *[end] * count), struct.pack(f"<{count}I", *[len(tile)] * count)
        return tiff([*grey(1, height, 8), *tiles, (324, 4, count, places), (325, 4, count, sizes)], tile)

    assert is_decoded(column(300))
    with pytest.raises(ImageTooManyPixels, match="the TIFF with its tiles' full sizes has 8000 x 20000"):
        open_image(column(20_000))


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize("tag", [273, 324])
def test_a_tiff_of_endless_parts_is_refused_unread(order: str, big: bool, tag: int) -> None:
    """Pillow makes an object of each strip and tile while it opens the file: 20 MiB of them take 5 GB."""
    size = [(278, 4, 1, 1)] if tag == 273 else [(322, 4, 1, 1), (323, 4, 1, 1)]
    few = [*grey(1, 3), *size, (tag, 4, 3, struct.pack(order + "III", 8, 9, 10))]
    assert is_decoded(tiff(few, bytes(3), order, big))
    for kind in (1, 4, 12):  # BYTE is what fits most; what Pillow ignores counts too
        many = [*grey(1, 2), *size, (tag, kind, 1001, bytes(8 * 1001))]
        with pytest.raises(ImageCorrupt, match=r"the TIFF has 1,001 (strips|tiles) .*the limit is 1,000"):
            open_image(tiff(many, bytes(2), order, big))
    tall = [*grey(1, 200_000), *size, (tag, 1, 200_000, bytes(200_000))]  # has so many rows, or claims to
    with pytest.raises(ImageCorrupt, match=r"200,000 .*the limit is 100,000"):
        open_image(tiff(tall, bytes(2), order, big))


def test_a_tiff_of_many_rows_may_have_a_strip_for_each() -> None:
    rows = struct.pack("<5000I", *range(200, 5200))
    data = tiff([*grey(3, 5000), (278, 3, 1, 1), (273, 4, 5000, rows), (279, 3, 5000, 5000 * b"\3\0")], b"")
    assert is_decoded(data)


@pytest.mark.parametrize(("tag", "kind", "count"), [(282, 5, 5000), (258, 3, 5000), (339, 3, 5000), (700, 5, 5000)])
def test_a_tiff_of_endless_values_is_refused_unread(tag: int, kind: int, count: int) -> None:
    entries = [each for each in grey(2, 2) if each[0] != tag]
    data = tiff(
        [*entries, (278, 3, 1, 2), (273, 4, 1, 0), (279, 3, 1, 4), (tag, kind, count, bytes(8 * count))], bytes(4)
    )
    with pytest.raises(ImageCorrupt, match=f"5,000 values of tag {tag}; the limit is 1,000"):
        open_image(data)


@pytest.mark.parametrize("tag", [34665, 34853, 65000])
def test_a_tiff_of_endless_fractions_is_refused_unread(tag: int) -> None:
    """Pillow reads EXIF whole, and all tags of an image that is turned: 20 MiB of fractions would take ten seconds."""
    entries = [*grey(2, 2), (273, 4, 1, 0), (278, 4, 1, 2), (279, 4, 1, 4)]
    many, fractions = struct.pack("<HHII", 33434, 5, 10_001, 1000), bytes(8 * 10_001)
    if tag == 65000:
        data = tiff([*entries, (tag, 5, 10_001, fractions)], bytes(4))
    else:
        start = len(tiff([*entries, (tag, 4, 1, 0)], bytes(4)))
        data = tiff([*entries, (tag, 4, 1, start)], bytes(4) + struct.pack("<H", 1) + many + bytes(4)) + fractions
    with pytest.raises(ImageCorrupt, match=r"tags of the TIFF have 10,001 fractions and .* the limit is 10,000"):
        open_image(data)
    with pytest.raises(ImageCorrupt, match=f"tag {tag} points nowhere" if tag != 65000 else "10,001 fractions"):
        open_image(data.replace(struct.pack("<HHI", tag, 4, 1), struct.pack("<HHI", tag, 9, 1)))


def test_a_tiff_whose_fractions_are_two_directories_away() -> None:
    entries = [*grey(2, 2), (273, 4, 1, 0), (278, 4, 1, 2), (279, 4, 1, 4)]
    start = len(tiff([*entries, (34665, 4, 1, 0), (40965, 4, 1, 0)], bytes(4)))
    exif = struct.pack("<HHHIII", 1, 40965, 4, 1, start + 18, 0)
    inner = struct.pack("<HHHIII", 1, 33434, 5, 10_001, start + 36, 0)
    data = tiff([*entries, (34665, 4, 1, start), (40965, 4, 1, start)], bytes(4) + exif + inner + bytes(8 * 10_001))
    with pytest.raises(ImageCorrupt, match=r"tags of the TIFF have 10,001 fractions"):
        open_image(data)


def test_a_tiff_may_have_a_stale_place_of_a_directory_that_nobody_reads() -> None:
    """As Pillow writes one with the EXIF data of a JPEG."""
    entries = [*grey(2, 2), (273, 4, 1, 0), (278, 4, 1, 2), (279, 4, 1, 4)]
    start = len(tiff([*entries, (34665, 4, 1, 0)], bytes(4)))
    exif = struct.pack("<HHHIII", 1, 40965, 4, 1, start + 18, 0)
    assert is_decoded(tiff([*entries, (34665, 4, 1, start)], bytes(4) + exif + b"\xff" * 100))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_data_that_starts_over_and_over_is_refused_unread(kind: str) -> None:
    """Each start was a copy of the rest, 3.5 million of them in 20 MiB."""
    image = picture("RGB", 60, 40)
    with pytest.raises(ImageCorrupt, match="starts over and over"):
        open_image(encode(image, kind, exif=b"Exif\0\0" * 1000))


@pytest.mark.parametrize("tag", [34665, 34853])
def test_a_tiff_with_one_directory_many_times(tag: int) -> None:
    """4,096 entries that lead to 4,096 each would be 17 million to check."""
    entries = [*grey(2, 2), (273, 4, 1, 0), (278, 4, 1, 2), (279, 4, 1, 4)]
    with pytest.raises(ImageCorrupt, match=f"there are 4,000 of the tag {tag}"):
        open_image(tiff([*entries, *4000 * [(tag, 4, 1, 8)]], bytes(4)))


def overlapping(kind: int, tags: int, size: int, width: int) -> bytes:
    """A directory of tags whose values all lie in one place."""
    place = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 1000 + number, kind, size // width, place) for number in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4) + bytes(size)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_data_whose_values_lie_in_one_place(kind: str) -> None:
    """Pillow before 13 copies all of them, thirty times as much here as there is."""
    image = picture("RGB", 60, 40)
    assert is_decoded(encode(image, kind, exif=overlapping(7, 10, 1_000_000, 1)))
    with pytest.raises(ImageCorrupt, match=r"the tags of the EXIF data have 30,000,000 bytes, and it 1,000,374 itself"):
        open_image(encode(image, kind, exif=overlapping(7, 30, 1_000_000, 1)))


def test_an_index_of_pictures_in_a_jpeg_with_endless_fractions_is_refused_unread() -> None:
    data = encode(picture("RGB", 60, 40), "JPEG")
    for tags, refused in ((1, False), (10, True)):
        index = b"MPF\0" + overlapping(5, tags, 40_000, 8)
        segment = b"\xff\xe2" + struct.pack(">H", 2 + len(index)) + index
        if not refused:
            open_image(data[:2] + segment + data[2:])
            continue
        with pytest.raises(ImageCorrupt, match="the tags of the index of pictures have 50,000 fractions"):
            open_image(data[:2] + segment + data[2:])


def test_exif_data_of_an_avif_with_endless_fractions_are_refused_unread() -> None:
    """Pillow reads all of them where only the container says how the picture is turned: 19 MB took 8 s and 700 MB."""
    image = picture("RGB", 60, 40)
    turned = Image.Exif()
    turned[274] = 6
    turned[33434] = 0.5
    assert is_decoded(encode(image, "AVIF", exif=turned.tobytes()))
    exif = tiff([(274, 3, 1, 6), (33434, 5, 10_001, bytes(8 * 10_001))], b"")
    with pytest.raises(ImageCorrupt, match="the tags of the EXIF data have 10,001 fractions"):
        open_image(encode(image, "AVIF", exif=exif))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_data_of_endless_orientations_are_refused_unread(kind: str) -> None:
    exif = tiff([(274, 5, 100_000, bytes(800_000))], b"")
    data = encode(picture("RGB", 60, 40), kind, **({} if kind == "JPEG" else {"exif": exif}))
    if kind == "JPEG":  # in pieces
        pieces = [b"Exif\0\0" + exif[start : start + 60_000] for start in range(0, len(exif), 60_000)]
        segments = (b"\xff\xe1" + struct.pack(">H", 2 + len(piece)) + piece for piece in pieces)
        data = data[:2] + b"".join(segments) + data[2:]
    with pytest.raises(ImageCorrupt, match=r"100,000 orientations; the limit is 1,000|more than 10 segments of EXIF"):
        open_image(data)


@pytest.mark.parametrize("tag", [256, 257, 278, 322, 323])
@pytest.mark.parametrize("again", [False, True], ids=["alone", "behind another"])
def test_a_tiff_whose_sizes_are_of_types_that_pillow_ignores(tag: int, again: bool) -> None:
    """libtiff reads an SLONG8, and would decode a tile of a size that nobody has checked."""
    tile = zlib.compress(bytes(16 * 16))
    sizes = [(322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 1, 0), (325, 4, 1, len(tile))]
    entries = [*grey(16, 16, 8), *sizes]
    assert is_decoded(tiff(entries, tile))
    kept = entries if again else [entry for entry in entries if entry[0] != tag]
    with pytest.raises(ImageCorrupt, match=rf"tag {tag}, a size, has 1 values of type 17; it takes .* SHORT or LONG"):
        open_image(tiff([*kept, (tag, 17, 1, struct.pack("<q", 9000))], tile))


def run_length_bmp(width: int, height: int) -> bytes:
    """One red pixel a row, then its end: the file has 4 bytes a row."""
    palette, rows = 256 * b"\0\0\xff\0", height * b"\1\1\0\0"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 0, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def test_a_large_bmp_of_runs_is_refused_undecoded() -> None:
    """Pillow decodes runs in Python: 33 kB keep a core for seconds."""
    assert is_decoded(run_length_bmp(1000, 800))
    assert is_decoded(encode(Image.new("P", (2500, 2000)), "BMP"))
    with pytest.raises(ImageTooManyPixels, match=r"run-length encoded.* 8000 x 8000 .* the limit is 4,000,000"):
        open_image(run_length_bmp(8000, 8000))
