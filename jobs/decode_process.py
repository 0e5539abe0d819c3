"""A process that decodes one image at a time and may die of it, and the one that owns it.

The decode tasks keep one such process each. An image in whose decoding it dies, or does not end, is tried once
more in a fresh process; if that ends the same way, the image is what kills it: `image_crashed_decoder`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from clipfleet.checkpoint import PixelSpec
from clipfleet.errors import ClipfleetError, ImageCorrupt, ImageCrashedDecoder, JobError
from clipfleet.images import DEFAULT_LIMITS, ImageLimits, decode

TIMEOUT_S = 120  # the slowest image within the limits takes a few seconds; the rest is for slow disks
_STARTS = 3
_ROOT = str(Path(__file__).resolve().parents[1])
_COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from jobs.decode_process import serve; serve(int(sys.argv[2]))"

Reply = tuple[int, int] | str  # (width, height), with the pixels following, or an error's code


class DecodeProcess:
    """Decodes for one checkpoint, each image into memory of the caller."""

    def __init__(self, spec: PixelSpec, limits: ImageLimits = DEFAULT_LIMITS, timeout_s: float = TIMEOUT_S) -> None:
        self.spec = spec
        self.limits = limits
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode_into(self, source: bytes | os.PathLike[str], pixels: np.ndarray) -> Reply:
        """Decode a path or bytes into `pixels` (H, W, 3) uint8. Returns (width, height) or the error's code."""
        for _ in range(2):
            connection = self._connection or self._start()
            try:
                return self._ask(connection, source, pixels)
            except (EOFError, OSError):  # it died, or was too slow
                self.close()
        return ImageCrashedDecoder.code

    def _ask(self, connection: Connection, source: bytes | os.PathLike[str], pixels: np.ndarray) -> Reply:
        connection.send(source)
        reply: Reply = _receive(connection, self.timeout_s)
        if not isinstance(reply, str):
            connection.recv_bytes_into(pixels.data.cast("B"))
        return reply

    def _start(self) -> Connection:
        for _ in range(_STARTS):
            connection = self._launch()
            with suppress(EOFError, OSError):
                connection.send((self.spec, self.limits))
                _receive(connection, self.timeout_s)  # so that no image is blamed for a process that never ran
                return connection
            self.close()
        raise JobError(f"the decoders' process does not start: {sys.executable}")

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


def _decode(source: bytes | os.PathLike[str], spec: PixelSpec, limits: ImageLimits) -> tuple[np.ndarray | None, Reply]:
    try:
        pixels, width, height = decode(source, spec, limits)
    except ClipfleetError as error:
        return None, error.code
    except Exception:  # whatever it is, it is this image's fault, and the others go on
        return None, ImageCorrupt.code
    return pixels, (width, height)
