"""`clipfleet embed` as a process of its own, and what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.deployments.processes import private_folder
from tests.deployments.service import BIN, Command, running


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@contextmanager
def embedding(*arguments: str | Path, model: str | Path = "tiny", **variables: Any) -> Iterator[Command]:
    """A running job, after which nothing may be left."""
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "embed", *arguments, "--model", model, folder=folder, **variables) as command,
    ):
        yield command


def embed(*arguments: str | Path, model: str | Path = "tiny", **variables: Any) -> Finished:
    """Run a job to its end."""
    with embedding(*arguments, model=model, **variables) as command:
        return Finished(command.wait(300), command.out, command.err)


def read(dest: Path) -> pa.Table:
    """All rows of DEST."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(dest.glob("part-*.parquet"))])


def errors(table: pa.Table) -> dict[str, str]:
    """The failed rows' codes by id."""
    pairs = zip(table.column("id").to_pylist(), table.column("error").to_pylist(), strict=True)
    return {name: code for name, code in pairs if code is not None}


def vectors(table: pa.Table) -> dict[str, np.ndarray]:
    """The good rows' vectors by id."""
    good = table.filter(table.column("embedding").is_valid())
    matrix = good.column("embedding").combine_chunks().flatten().to_numpy().reshape(good.num_rows, -1)
    return dict(zip(good.column("id").to_pylist(), matrix, strict=True))


def summary(dest: Path) -> dict[str, Any]:
    return json.loads((dest / "_clipfleet.json").read_text())
