"""On PYTHONPATH, gives a service faults that libraries and devices have, which nothing from outside could cause.

A JPEG with the comment below ends the process that decodes it. A file `hang` in the folder FAULTS makes the next forward
pass of an image encoder hang, a file `raise` makes it run out of memory; whoever does so takes the file away. To a file
`encoded` each forward pass of images adds a line with their number. Each JPEG leaks LEAK_BYTES. A forward pass takes
FORWARD_S more for each of its images.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import JpegImagePlugin

COMMENT = b"clipfleet: end this process"
LEAK_BYTES = int(os.environ.get("LEAK_BYTES", 0))
FORWARD_S = float(os.environ.get("FORWARD_S", 0))
_leaked: list[bytearray] = []
_load = JpegImagePlugin.JpegImageFile.load


def load(self: JpegImagePlugin.JpegImageFile) -> object:
    if self.info.get("comment") == COMMENT:
        os.kill(os.getpid(), signal.SIGKILL)
    if LEAK_BYTES:
        _leaked.append(bytearray(LEAK_BYTES))
    return _load(self)


JpegImagePlugin.JpegImageFile.load = load  # type: ignore[method-assign]


def _asked_to(what: str) -> bool:
    try:
        Path(os.environ["FAULTS"], what).unlink()
    except (OSError, KeyError):
        return False
    return True


def _note(images: int) -> None:
    try:
        log = os.open(Path(os.environ["FAULTS"], "encoded"), os.O_WRONLY | os.O_APPEND)
    except (OSError, KeyError):
        return
    os.write(log, f"{images}\n".encode())
    os.close(log)


def _break(module: ModuleType) -> None:
    encode = module.Encoder.encode_pixels

    def encode_pixels(self: object, *arguments: Any) -> object:
        _note(len(arguments[0]))
        if _asked_to("hang"):
            time.sleep(3600)
        if _asked_to("raise"):
            raise RuntimeError("out of memory, on purpose")
        time.sleep(FORWARD_S * len(arguments[0]))
        return encode(self, *arguments)

    module.Encoder.encode_pixels = encode_pixels


class AfterImport(importlib.abc.MetaPathFinder):
    """Changes the encoder's class when it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "clipfleet.encoder":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _break(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterImport())
