"""A process that fetches and decodes one image at a time and may die of it, and the one that owns it.

Every decode task of the job keeps one. The service's decoders start one for images that were with a decoder when it died.
It works on one image at a time, so an image in whose decoding it dies, or does not end, is what ended it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import (
    ClipfleetError,
    ImageCorrupt,
    ImageCrashedDecoder,
    ImageNotFound,
    ImageUnreadable,
    Unavailable,
)
from clipfleet.images import DEFAULT_LIMITS, ImageLimits, decode

TIMEOUT_S = 120  # the slowest image within the limits takes a few seconds; the rest is for slow disks
_STARTS = 3
_ROOT = str(Path(__file__).resolve().parents[1])
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv[1]); from clipfleet.decode_process import serve; serve(int(sys.argv[2]))"
)


@dataclass(frozen=True)
class Uri:
    """An object of a file system that pyarrow opens."""

    address: str


Source = bytes | os.PathLike[str] | Uri
Reply = tuple[int, int] | ClipfleetError  # (width, height), with the pixels following, or what is wrong


class DecodeProcess:
    """Decodes for one checkpoint, each image into memory of the caller."""

    def __init__(self, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self.spec = spec
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode_into(self, source: Source, pixels: np.ndarray, *, timeout_s: float = TIMEOUT_S, tries: int = 2) -> Reply:
        """Decode an image into `pixels` (H, W, 3) uint8. Returns (width, height) or the error.

        That is ImageCrashedDecoder (of a Uri ImageUnreadable) where the process died, or did not end in `timeout_s`, at each
        of `tries`.
        """
        for _ in range(tries):
            connection = self._connection or self._start(timeout_s)
            try:
                return self._ask(connection, source, pixels, timeout_s)
            except (EOFError, OSError):  # it died, or was too slow
                self.close()
        if isinstance(source, Uri):  # more likely the file system's fault than the image's
            return ImageUnreadable(
                f"fetching and decoding {source.address!r} took over {timeout_s:.0f} s, or ended its process"
            )
        return ImageCrashedDecoder("the process that decoded this image died of it, twice")

    def _ask(self, connection: Connection, source: Source, pixels: np.ndarray, timeout_s: float) -> Reply:
        connection.send(source)
        reply: Reply = _receive(connection, timeout_s)
        if not isinstance(reply, ClipfleetError):
            connection.recv_bytes_into(pixels.data.cast("B"))
        return reply

    def _start(self, timeout_s: float) -> Connection:
        for _ in range(_STARTS):
            connection = self._launch()
            with suppress(EOFError, OSError):
                connection.send((self.spec, self.limits))
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
            self._process.wait()
        self._connection = self._process = None


def _receive(connection: Connection, timeout_s: float) -> Any:
    if not connection.poll(timeout_s):
        raise TimeoutError
    return connection.recv()


def serve(descriptor: int) -> None:
    """Answer the parent until it closes the connection or dies."""
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        spec, limits = connection.recv()
        connection.send("ready")
        while True:
            pixels, reply = _decode(connection.recv(), spec, limits)
            connection.send(reply)
            if pixels is not None:
                connection.send_bytes(pixels.data.cast("B"))


def _decode(source: Source, spec: PixelSpec, limits: ImageLimits) -> tuple[np.ndarray | None, Reply]:
    try:
        content = _fetch(source.address, limits) if isinstance(source, Uri) else source
        pixels, width, height = decode(content, spec, limits)
    except ClipfleetError as error:
        return None, error
    except Exception as error:  # whatever it is, it is this image's fault, and the others go on
        return None, ImageCorrupt(f"the image does not decode: {error}")
    return pixels, (width, height)


def _fetch(uri: str, limits: ImageLimits) -> bytes:
    """Read an object, but never more than the limit."""
    from pyarrow import fs  # here, because local files need none of it

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        with filesystem.open_input_stream(path) as stream:
            return stream.read(limits.max_bytes + 1)  # decode() refuses what is longer
    except FileNotFoundError as error:
        raise ImageNotFound(f"no object at {uri!r}") from error
    except Exception as error:  # each file system has errors of its own
        raise ImageUnreadable(f"cannot read {uri!r}: {error}") from error
