"""Decodes one image in a process that may die of it: `python -m deployments.decode_child` under decoder.py.

Reads a pickle of (bytes, PixelSpec, ImageLimits) from its parent on stdin, and writes a pickle of the pixels or
the ImageError to stdout. Both ends are our own; nothing a client sent is unpickled.
"""

from __future__ import annotations

import pickle
import sys

from clipfleet.errors import ImageError
from clipfleet.images import decode


def main() -> None:
    data, spec, limits = pickle.load(sys.stdin.buffer)
    try:
        outcome = decode(data, spec, limits).pixels
    except ImageError as error:
        outcome = error
    pickle.dump(outcome, sys.stdout.buffer)


if __name__ == "__main__":
    main()
