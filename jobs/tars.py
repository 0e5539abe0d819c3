"""Tar shards, as WebDataset has them: their images are found by the headers alone, and read where they lie.

Nothing is unpacked, so a member's name is never a path of this machine. Members that are no images, hidden ones (a
part of the name starts with a dot), folders and links are left out. What cannot be read in place, or is named by a path
that leads out of the tar, is a row with an error. So is a tar that is compressed, cut or damaged, under its own name,
besides the images that come before the damage.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from clipfleet.errors import ImageNotFound, ImageUnreadable
from clipfleet.image_files import SUFFIXES
from jobs.items import Item
from jobs.places import UNKNOWN, FileState, is_uri, known_filesystem, look, printable, split_query

ReadAt = Callable[[int, int], bytes]  # (offset, bytes)

_BLOCK = 512
_HEADER_BYTES = 2**20  # of one extended header: long names, and whatever else tar programs note down
_REMOTE_WINDOW = 64 * 1024  # a request takes as long as reading this much
_LOCAL_WINDOW = 4096
_ZEROS = 2**20  # that are read at a time
_LONG_NAME, _LONG_LINK, _EXTENDED, _EXTENDED_SUN, _GLOBAL, _SPARSE = b"L", b"K", b"x", b"X", b"g", b"S"
_SPARSE_MORE = {True: 482, False: 504}  # where a sparse header, and its further blocks, say that another one follows


class Damaged(Exception):
    """The rest of a tar cannot be read; the message says why."""


class Member(NamedTuple):
    """A file in a tar. `whole`: its bytes lie in one piece, at `offset`."""

    name: str
    offset: int
    size: int
    whole: bool


def shard_items(shard: Item) -> Iterator[Item]:
    """The images of a tar as inputs named SHARD/MEMBER; last, if it is damaged, an input for the tar itself."""
    assert isinstance(shard.place, bytes)
    path = os.fsdecode(shard.place)
    state = look(path) if shard.state.modified is None else shard.state
    if state is None:
        yield shard._replace(error=ImageNotFound.code)
        return
    try:
        with _opened(path) as (read_at, size):
            for member in members(read_at, size):
                known = UNKNOWN if state == UNKNOWN else FileState(member.size, state.modified)
                yield from _item(shard, member, size, known)
    except (Damaged, OSError):
        yield shard._replace(error=ImageUnreadable.code, state=state)


def _item(shard: Item, member: Member, size: int, state: FileState) -> Iterator[Item]:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    outside = ".." in parts
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    if hidden or not parts or not parts[-1].lower().endswith(SUFFIXES):
        return
    name = printable("/".join(parts))
    stem, query = split_query(shard.uri or "") if is_uri(shard.uri or "") else (shard.uri, "")
    yield Item(
        f"{shard.id}/{name}",
        f"{stem}/{name}{query}",
        shard.place,
        (member.offset, member.size, size),
        None if member.whole and not outside else ImageUnreadable.code,
        state,
    )


@contextmanager
def _opened(path: str) -> Iterator[tuple[ReadAt, int]]:
    if is_uri(path):
        filesystem, inside = known_filesystem(path)
        with filesystem.open_input_file(inside) as remote:
            yield _windowed(lambda offset, size: remote.read_at(size, offset), _REMOTE_WINDOW), remote.size()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO without a writer would block for ever
    try:
        read_at = _windowed(lambda offset, size: os.pread(descriptor, size, offset), _LOCAL_WINDOW)
        yield read_at, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _windowed(read_at: ReadAt, window: int) -> ReadAt:
    """Read at least `window` bytes at a time, and keep the last ones: small members' headers lie close together."""
    start, held = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, held
        if not start <= offset <= offset + size <= start + len(held):
            start, held = offset, read_at(offset, max(size, window))
        return held[offset - start : offset - start + size]

    return read


def members(read_at: ReadAt, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in their order. Raises Damaged where it cannot be followed further."""
    offset = 0
    name: str | None = None  # of the next member, and its size, where headers before it say so
    length: int | None = None
    sparse = False
    while True:
        header = _header(read_at, offset)
        if header is None:  # the end; or another tar follows, joined to this one, or what is left of a header's tar
            if (name, length, sparse) != (None, None, False):
                raise Damaged("an extended header stands before zeros")
            offset = _behind_zeros(read_at, offset + _BLOCK, size)
            if offset >= size:
                return
            continue
        offset += _BLOCK
        if header.type in (_LONG_NAME, _LONG_LINK, _EXTENDED, _EXTENDED_SUN, _GLOBAL):
            content = _extension(read_at, offset, header.size, size)
            offset += _padded(header.size)
            if header.type == _LONG_NAME:
                name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif header.type in (_EXTENDED, _EXTENDED_SUN):
                name, length, sparse = _extended(content, name)
            continue
        if header.type == _SPARSE:
            sparse = True
            offset = _behind_sparse(read_at, offset)
        held = header.size if length is None else length
        # Links, folders and devices have no content, whatever their size says.
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        if has_content and not 0 <= held <= size - offset:
            raise Damaged(f"it ends within {name or header.name!r}, or is damaged there")
        if header.isreg():
            yield Member(name or header.name, offset, held, not sparse)
        offset += _padded(held) if has_content else 0
        name, length, sparse = None, None, False


def _header(read_at: ReadAt, offset: int) -> tarfile.TarInfo | None:
    """The header at `offset`; None for a block of zeros, as they end a tar."""
    block = read_at(offset, _BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.TarError, ValueError) as error:
        if offset == 0:
            raise Damaged("it is no tar; a compressed one cannot be read in place") from error
        raise Damaged("it is cut or damaged" if block else "it is cut: the zeros that end a tar are missing") from error


def _behind_zeros(read_at: ReadAt, offset: int, size: int) -> int:
    """The next block that is not all zeros, from the one at `offset` on; `size` if there is none."""
    while offset < size:
        piece = read_at(offset, min(_ZEROS, size - offset))
        rest = piece.lstrip(b"\0")
        if rest or not piece:
            return offset + (len(piece) - len(rest)) // _BLOCK * _BLOCK
        offset += len(piece)
    return size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _extension(read_at: ReadAt, offset: int, length: int, size: int) -> bytes:
    if not 0 <= length <= min(_HEADER_BYTES, size - offset):
        raise Damaged(f"an extended header has {length:,} bytes; the limit is {_HEADER_BYTES:,}")
    return read_at(offset, length)


def _extended(content: bytes, name: str | None) -> tuple[str | None, int | None, bool]:
    """Name, size and whether it is sparse, from the records `LENGTH KEY=VALUE\\n` of a pax header (POSIX 1003.1)."""
    length: int | None = None
    sparse = False
    position = 0
    while position < len(content) and content[position] != 0:
        space = content.find(b" ", position, position + 20)
        digits = content[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        if not space < end <= len(content):
            raise Damaged("an extended header is damaged")
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        if key in (b"path", b"GNU.sparse.name"):
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise Damaged("an extended header is damaged")
            length = int(value)
        sparse = sparse or key.startswith(b"GNU.sparse.")
        position = end
    return name, length, sparse


def _behind_sparse(read_at: ReadAt, offset: int) -> int:
    """Where the content of a sparse file starts: behind the blocks in which its map goes on."""
    block, first = read_at(offset - _BLOCK, _BLOCK), True
    while len(block) == _BLOCK and block[_SPARSE_MORE[first]]:
        block, first = read_at(offset, _BLOCK), False
        offset += _BLOCK
    return offset
