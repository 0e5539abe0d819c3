"""A process that fetches and decodes one image at a time and may die of it, and the one that owns it.

Every decode task of the job keeps one. The service's decoders start one for images that were with a decoder when it died.
It works on one image at a time, so an image in whose decoding it dies, or does not end, is what ended it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from clipfleet import turns
from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import (
    ClipfleetError,
    ImageCorrupt,
    ImageCrashedDecoder,
    ImageNotFound,
    ImageUnreadable,
    Unavailable,
)
from clipfleet.image_files import DEFAULT_LIMITS, ImageLimits, decoding_bytes, open_image, read_file
from clipfleet.images import check_size, to_picture

TIMEOUT_S = 120  # for reading, and again for decoding; the slowest image within the limits takes a few seconds
_END_S = 5
_STARTS = 3
_ROOT = str(Path(__file__).resolve().parents[1])
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv[1]); from clipfleet.decode_process import serve; serve(int(sys.argv[2]))"
)


State = tuple[int | None, int | None]  # a file's bytes and last change (microseconds since 1970), None if unknown


@dataclass(frozen=True)
class Uri:
    """An object of a file system that pyarrow opens. `look`: ask for its state too, which costs a request."""

    address: str
    look: bool = False


@dataclass(frozen=True)
class Section:
    """The `length` bytes at `offset` of a file: a local path, or a URI that pyarrow opens. `file` is the state that it must
    have, or what is there is another file's."""

    address: str
    offset: int
    length: int
    file: State = (None, None)


_READING, _WAITING, _DECODING = "reading", "waiting", "decoding"  # what the process does from now on

Source = bytes | os.PathLike[str] | Uri | Section
Reply = tuple[int, int] | ClipfleetError  # (width, height), with the pixels following, or what is wrong
Turn = Callable[[int], AbstractContextManager[None]]  # for an image that takes so many bytes


class DecodeProcess:
    """Decodes for one checkpoint, each image into memory of the caller.

    With `turn_s`, large images wait for a turn (clipfleet/turns.py), so many seconds at most.
    """

    def __init__(self, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS, *, turn_s: float | None = None) -> None:
        self.spec = spec
        self.limits = limits
        self.turn_s = turn_s
        # Of the last image, if it was a Uri with `look`.
        self.state: State = (None, None)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._step = _DECODING

    def decode_into(self, source: Source, pixels: np.ndarray, *, timeout_s: float = TIMEOUT_S, tries: int = 2) -> Reply:
        """Decode an image into `pixels` (H, W, 3) uint8. Returns (width, height) or the error.

        That is ImageCrashedDecoder where the process died, or did not end in `timeout_s`, at each of `tries`; or
        ImageUnreadable where it had not read the image by then, which more likely is its file system's fault.
        """
        self.state = (None, None)
        for _ in range(tries):
            connection = self._connection or self._start(timeout_s)
            self._step = _DECODING if isinstance(source, bytes) else _READING
            try:
                return self._ask(connection, source, pixels, timeout_s)
            except (EOFError, OSError):  # it died, or was too slow
                self.close()
        if self._step == _READING:
            return ImageUnreadable(f"reading {source!r} took over {timeout_s:.0f} s, or ended its process")
        return ImageCrashedDecoder("the process that decoded this image died of it, twice")

    def _ask(self, connection: Connection, source: Source, pixels: np.ndarray, timeout_s: float) -> Reply:
        connection.send(source)
        answer = _receive(connection, timeout_s)
        while isinstance(answer, str):
            self._step = answer
            answer = _receive(connection, timeout_s + ((self.turn_s or 0) if answer == _WAITING else 0))
        reply: Reply
        reply, self.state = answer
        if not isinstance(reply, ClipfleetError):
            connection.recv_bytes_into(pixels.data.cast("B"))
        return reply

    def _start(self, timeout_s: float) -> Connection:
        for _ in range(_STARTS):
            connection = self._launch()
            with suppress(EOFError, OSError):
                connection.send((self.spec, self.limits, self.turn_s))
                _receive(connection, timeout_s)  # so that no image is blamed for a process that never ran
                return connection
            self.close()
        raise Unavailable(f"the decoders' process does not start: {sys.executable}")

    def _launch(self) -> Connection:
        self._connection, theirs = Pipe()
        arguments = [sys.executable, "-c", _COMMAND, _ROOT, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                arguments, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # image libraries print their warnings there
            )  # fmt: skip
        return self._connection

    def close(self) -> None:
        """End the process; the next image starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            # One that waits for a file system which does not answer ends only then; subprocess reaps it at a later start.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self._connection = self._process = None


def _receive(connection: Connection, timeout_s: float) -> Any:
    if not connection.poll(timeout_s):
        raise TimeoutError
    return connection.recv()


def serve(descriptor: int) -> None:
    """Answer the parent until it closes the connection or dies."""
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        spec, limits, turn_s = connection.recv()
        connection.send("ready")
        while True:
            content = source = connection.recv()
            state = _look(source.address) if isinstance(source, Uri) and source.look else (None, None)
            if not isinstance(source, bytes):
                content = _read(source, limits)
                connection.send(_DECODING)
            pixels, reply = _decode(content, spec, limits, partial(_turn, connection, turn_s))
            connection.send((reply, state))
            if pixels is not None:
                connection.send_bytes(pixels.data.cast("B"))


def _read(source: os.PathLike[str] | Uri | Section, limits: ImageLimits) -> bytes | ClipfleetError:
    try:
        if isinstance(source, Uri):
            return _fetch(source.address, limits)
        if isinstance(source, Section):
            return _read_section(source, limits)
        return read_file(source, limits)
    except ClipfleetError as error:
        return error
    except Exception as error:
        return ImageUnreadable(f"cannot read {source!r}: {error}")


def _decode(
    content: bytes | ClipfleetError, spec: PixelSpec, limits: ImageLimits, turn: Turn
) -> tuple[np.ndarray | None, Reply]:
    if isinstance(content, ClipfleetError):
        return None, content
    try:
        with open_image(content, limits) as image:
            check_size(image, spec, limits)  # what is refused waits for no turn
            with turn(decoding_bytes(image, spec)):
                pixels, width, height = to_picture(image, spec, limits)
    except ClipfleetError as error:
        return None, error
    except Exception as error:  # whatever it is, it is this image's fault, and the others go on
        return None, ImageCorrupt(f"the image does not decode: {error}")
    return pixels, (width, height)


@contextmanager
def _turn(connection: Connection, seconds: float | None, size: int) -> Iterator[None]:
    """Hold a turn for an image that takes `size` bytes, if that is many; the parent's time for decoding begins with it."""
    if seconds is None or size <= turns.LARGE_BYTES:
        yield
        return
    connection.send(_WAITING)
    with turns.turn(seconds):
        connection.send(_DECODING)
        yield


def _look(uri: str) -> State:
    with suppress(Exception):  # each file system has errors of its own; fetching the object names them
        filesystem, path = _filesystem(uri)
        info = filesystem.get_file_info(path)
        return info.size, info.mtime_ns // 1000 if info.mtime_ns else None  # 0 for what pyarrow cannot read
    return None, None


def _fetch(uri: str, limits: ImageLimits) -> bytes:
    """Read an object, but never more than the limit."""
    with _errors_of(uri):
        filesystem, path = _filesystem(uri)
        with filesystem.open_input_stream(path) as stream:
            return stream.read(limits.max_bytes + 1)  # open_image() refuses what is longer


def _read_section(section: Section, limits: ImageLimits) -> bytes:
    """Read a part of a file, but never more than the limit."""
    wanted = min(section.length, limits.max_bytes + 1)  # open_image() refuses what is longer
    with _errors_of(section.address):
        if "://" in section.address:
            content = _open_remote(section.address).read_at(wanted, section.offset)
            # Listings of S3 have milliseconds, answers for an object seconds.
            now, unit = _look(section.address), 1_000_000
        else:
            with open(section.address, "rb") as file:
                content = os.pread(file.fileno(), wanted, section.offset)
                status = os.fstat(file.fileno())
            now, unit = (status.st_size, status.st_mtime_ns // 1000), 1
    if len(content) < wanted or not _agree(section.file, now, unit):
        raise ImageUnreadable(f"{section.address!r} has changed since it was listed, while the job ran")
    return content


def _agree(listed: State, now: State, unit: int) -> bool:
    """Whether two states can be one file's, times compared in units of so many microseconds."""
    sizes_differ = None not in (listed[0], now[0]) and listed[0] != now[0]
    times = [time // unit for time in (listed[1], now[1]) if time is not None]
    return not sizes_differ and len(set(times)) < 2


@contextmanager
def _errors_of(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ImageNotFound(f"no object at {address!r}") from error
    except Exception as error:  # each file system has errors of its own
        raise ImageUnreadable(f"cannot read {address!r}: {error}") from error


def _filesystem(uri: str) -> tuple[Any, str]:
    from pyarrow import fs  # here, because local files need none of it

    return fs.FileSystem.from_uri(uri)


@lru_cache(maxsize=1)  # the images of a tar come one after the other
def _open_remote(uri: str) -> Any:
    filesystem, path = _filesystem(uri)
    return filesystem.open_input_file(path)
