"""Damaged files, and files that are no images: each ends in an error of the tree with its code, or in pixels."""

from __future__ import annotations

import os
import random
import struct
import threading
from pathlib import Path

import pytest
from PIL import Image

from clipfleet.errors import (
    ImageCorrupt,
    ImageEmpty,
    ImageError,
    ImageFormatUnsupported,
    ImageNotFound,
    ImageUnreadable,
)
from clipfleet.image_files import sniff
from clipfleet.images import decode
from tests.pictures import encode, picture
from tests.reference import CLIP, spec_of

SPEC = spec_of(CLIP)
KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]

# Pillow warns about what it finds in damaged files, in words of many kinds.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {kind: encode(picture("RGB", 160, 120), kind) for kind in KINDS}


def outcome(data: bytes | bytearray) -> str:
    """The code of the error that decoding raises, or "pixels"; anything but an ImageError comes through."""
    try:
        return "pixels" if decode(data, SPEC).pixels.shape == (56, 56, 3) else "pixels of a wrong shape"
    except ImageError as error:
        return error.code


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_corrupt(files: dict[str, bytes], kind: str) -> None:
    data = files[kind]
    for percent in (5, 10, 25, 50, 75, 90):
        with pytest.raises(ImageCorrupt) as caught:
            decode(data[: len(data) * percent // 100], SPEC)
        assert caught.value.code == "image_corrupt"


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_gives_pixels_or_an_error_of_the_tree(files: dict[str, bytes], kind: str) -> None:
    data = files[kind]
    for length in [*range(0, 64), *range(64, len(data), max(1, len(data) // 40)), len(data) - 1]:
        assert outcome(data[:length]) in {"pixels", "image_corrupt", "image_format_unsupported", "image_empty"}


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_give_pixels_or_an_error_of_the_tree(files: dict[str, bytes], kind: str) -> None:
    rng = random.Random(kind)
    for attempt in range(120):
        data = bytearray(files[kind])
        reach = len(data) if attempt % 2 else 200  # every other time in the headers
        for _ in range(rng.choice((1, 4, 32))):
            data[rng.randrange(min(reach, len(data)))] ^= 1 << rng.randrange(8)
        assert outcome(data) in {"pixels", "image_corrupt", "image_format_unsupported", "image_too_many_pixels"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_alone_is_corrupt(files: dict[str, bytes], kind: str) -> None:
    head = files[kind][:12]
    assert sniff(head) == kind
    with pytest.raises(ImageCorrupt):
        decode(head + b"and then something else entirely" * 50, SPEC)


@pytest.mark.parametrize("empty", [b"", bytearray(), memoryview(b"")])
def test_zero_bytes_are_empty(empty: bytes | bytearray | memoryview) -> None:
    with pytest.raises(ImageEmpty) as caught:
        decode(empty, SPEC)
    assert caught.value.code == "image_empty"


NOT_IMAGES = {
    "text": b"hello, I am a text file\n",
    "one byte": b"\xff",
    "zeros": bytes(1000),
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "html": b"<!doctype html><html></html>",
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "mp4": b"\0\0\0\x18ftypisom\0\0\0\0isommp42",
    "zip": b"PK\x03\x04" + bytes(100),
    "wav": b"RIFF\x24\0\0\0WAVEfmt ",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "pickle": b"\x80\x04\x95\x10\0\0\0",
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_unsupported(name: str) -> None:
    with pytest.raises(ImageFormatUnsupported, match="accepted are JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF") as caught:
        decode(NOT_IMAGES[name], SPEC)
    assert caught.value.code == "image_format_unsupported"


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "JPEG2000", "PCX"])
def test_formats_that_pillow_knows_and_we_do_not_accept_are_unsupported(kind: str) -> None:
    with pytest.raises(ImageFormatUnsupported):
        decode(encode(picture("RGB", 32, 32), kind), SPEC)


def test_a_missing_file_is_a_file_not_found_error_too(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jpg", tmp_path / "no" / "such" / "folder.jpg"):
        with pytest.raises(ImageNotFound, match=path.name) as caught:
            decode(path, SPEC)
        assert isinstance(caught.value, FileNotFoundError) and caught.value.code == "file_not_found"


def test_a_path_through_a_file_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ImageNotFound):
        decode(tmp_path / "file" / "picture.jpg", SPEC)


def test_a_folder_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadable) as caught:
        decode(tmp_path, SPEC)
    assert isinstance(caught.value, OSError) and caught.value.code == "file_unreadable"


def test_a_fifo_without_a_writer_is_unreadable_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    caught: list[BaseException] = []

    def read() -> None:
        try:
            decode(tmp_path / "fifo.jpg", SPEC)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)  # reached only if reading blocks
    assert [type(error) for error in caught] == [ImageUnreadable]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_is_unreadable(path: str) -> None:
    with pytest.raises(ImageUnreadable):
        decode(path, SPEC)


@pytest.mark.parametrize("path", ["null\0byte.jpg", "x" * 5000])
def test_a_path_that_cannot_be_is_unreadable(path: str) -> None:
    with pytest.raises(ImageUnreadable):
        decode(path, SPEC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(ImageUnreadable):
        decode(tmp_path / "secret.png", SPEC)


def test_a_closed_pil_image_is_corrupt(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "picture.png")
    image = Image.open(tmp_path / "picture.png")
    image.close()
    with pytest.raises(ImageCorrupt):
        decode(image, SPEC)


def test_a_damaged_image_does_not_change_the_next(files: dict[str, bytes]) -> None:
    before = decode(files["JPEG"], SPEC).pixels.copy()
    for kind in KINDS:
        with pytest.raises(ImageError):
            decode(files[kind][:100], SPEC)
    assert (decode(files["JPEG"], SPEC).pixels == before).all()


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heicmiaf", b"isom\0\0\0\0mp42"])
def test_other_files_in_avifs_container_are_no_images(brands: bytes) -> None:
    box = struct.pack(">I", len(brands) + 8) + b"ftyp" + brands
    assert outcome(box + bytes(100)) == "image_format_unsupported"
    assert sniff(struct.pack(">I", 28) + b"ftypmif1\0\0\0\0mif1avifmiaf" + bytes(9)) == "AVIF"


@pytest.mark.parametrize("source", [None, 5, ["a.png"]])
def test_what_is_no_source_is_a_type_error(source: object) -> None:
    with pytest.raises(TypeError, match="path, bytes or a PIL image"):
        decode(source, SPEC)  # type: ignore[arg-type]
