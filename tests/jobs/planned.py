"""A run's plan, and what its decode tasks make of it, in this process: all of a job but Ray and the encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from clipfleet.image_files import DEFAULT_LIMITS
from jobs import decoding
from jobs.decoding import DecodePlan, decode_tasks, unpack
from jobs.destination import Claim, claim
from jobs.embed_images import _open_source
from jobs.options import EmbedOptions
from jobs.parts import Origin, write
from jobs.planning import Work, plan

TINY = find_checkpoint("tiny")
ORIGIN = Origin(fingerprint(TINY), "tiny", None, "float32", "torch")
DIMENSION = 8  # of vectors that stand for an encoder's


class Planned:
    """A run that has its plan."""

    def __init__(self, options: EmbedOptions, claimed: Claim) -> None:
        self.retired: list[str] = []
        self.claimed, self._options = claimed, options
        self.work: Work = plan(options, _open_source(options), TINY.pixels, ORIGIN, claimed, self.retired.extend)

    def decoded(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """The rows and pixels of each output file."""
        work = self.work
        decode = DecodePlan(
            work.tasks, self.claimed.scratch / "stop", TINY.pixels, DEFAULT_LIMITS, work.rows_per_file,
            work.source.manifest,
        )  # fmt: skip
        for table in decode_tasks({"item": np.arange(work.task_count)}, decode):
            for row in range(table.num_rows):
                yield unpack(row, table, TINY.pixels.size)

    def done(self) -> list[str]:
        """Write what is pending, with vectors that are not an encoder's; returns its ids."""
        ids = []
        for rows, pixels in self.decoded():
            vectors = np.random.default_rng(len(ids)).normal(size=(len(pixels), DIMENSION)).astype(np.float32)
            write(self.claimed, ORIGIN, self._options.format, rows, vectors)
            ids += rows.column("id").to_pylist()
        return ids


@contextmanager
def planned(source: Path | str, dest: Path, **options: Any) -> Iterator[Planned]:
    with claim(str(dest)) as claimed:
        yield Planned(EmbedOptions(source=str(source), dest=str(dest), model="tiny", **options), claimed)
    decoding._process(TINY.pixels, DEFAULT_LIMITS).close()


def embedded(source: Path | str, dest: Path, **options: Any) -> list[str]:
    """A whole run, with vectors that are not an encoder's; returns the ids of what was done."""
    with planned(source, dest, **options) as run:
        return run.done()
