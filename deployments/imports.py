"""Keeping a process from importing what it only might have used: seconds of every start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipfleet.encoder import Encoder


def hide(package: str) -> None:
    """Make `package` look as if it were not installed, unless it is imported already."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # None makes its import an ImportError


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Hide `package` until the block ends."""
    hide(package)
    try:
        yield
    finally:
        if sys.modules[package] is None:
            del sys.modules[package]


def encoder_class() -> type[Encoder]:
    """Import Encoder, for a process that does nothing else with transformers.

    Its configs and tokenizers need no torch, and the engine may not either: a second of a core, and 200 MB.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is missing
    with hidden("torch"):
        from clipfleet.encoder import Encoder
    return Encoder
