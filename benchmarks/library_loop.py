"""The library as a program of the protocol in benchmarks/programs.py.

library_loop.py CHECKPOINT PRECISION whole|reduced FILE...
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
from loguru import logger

from clipfleet import CLIPEmbedder


def main() -> None:
    logger.remove()
    checkpoint, precision, jpeg, *files = sys.argv[1:]
    embedder = CLIPEmbedder(checkpoint, "cpu", precision=precision, reduced_jpeg=jpeg == "reduced")

    def embed(paths: list[str]) -> np.ndarray:
        return np.stack(asyncio.run(embedder.generate_embeddings_batch(paths, show_progress=False)))  # type: ignore[arg-type]

    embed(files[:32])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        vectors = embed(files[: asked["count"]])
        seconds = time.perf_counter() - started
        if asked["out"]:
            np.save(asked["out"], vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
