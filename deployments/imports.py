"""Imports that leave out what is not used: seconds of every start."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipfleet.encoder import Encoder


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Make `package` look as if it were not installed until the block ends, unless it is imported already."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # None makes its import an ImportError
    try:
        yield
    finally:
        if sys.modules[package] is None:
            del sys.modules[package]


def import_serve() -> None:
    """Import Ray Serve without pandas, which it takes along to write data frames as JSON: 0.3 s of a core."""
    with hidden("pandas"):
        importlib.import_module("ray.serve")


def encoder_class() -> type[Encoder]:
    """Import Encoder, for a process that does nothing else with transformers.

    Its configs and tokenizers need no torch, and the engine may not either: a second of a core, and 170 MB.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is missing
    with hidden("torch"):
        from clipfleet.encoder import Encoder
    return Encoder
