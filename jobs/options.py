"""What a person may ask of the job."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from clipfleet.engines import choose_engine, settle_device
from clipfleet.errors import SettingsError
from clipfleet.qdrant import Collection
from jobs.parts import FORMATS, PARQUET
from jobs.places import is_uri
from jobs.tolerance import Tolerance


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """One run of the job. Raises SettingsError for values that cannot be.

    `source` is a folder or a glob of images or of tars, a tar, or a manifest (.parquet, .csv, .tsv, .jsonl); `dest` is a
    local folder. `format` is parquet or npy. `qdrant` is the URL of a server or a folder, `collection` a name there,
    `thumbnails` says whether its points hold small pictures too.
    `max_failures` is the number of failed rows that is no failure of the job, or their share such as "0.5%".
    `changed` does files again that are not what they were, and marks rows whose files have gone.
    `actors` is the number of encoders, by default one a GPU, or one for every 16 CPUs where there is none.
    Resources of one actor: `gpus_per_actor` where there are GPUs, and `cpus_per_actor`, by default half a CPU
    (on a Ray of our own, whose encoders share all cores anyway, and beside a GPU) or one CPU on somebody else's Ray.
    `rows_per_file` bounds the rows of one output file, and with them what a killed job has to do again.
    """

    source: str
    dest: str
    model: str = "openai/clip-vit-base-patch32"
    path_column: str | None = None
    bytes_column: str | None = None
    id_column: str | None = None
    batch_size: int = 32
    actors: int | None = None
    retry_errors: bool = False
    changed: bool = False
    max_failures: str | None = None
    format: str = PARQUET
    qdrant: str | None = None
    collection: str | None = None
    qdrant_api_key: str | None = field(default=None, repr=False)
    thumbnails: bool = False
    address: str | None = None
    device: str = "auto"
    precision: str = "float32"
    engine: str = "auto"
    reduced_jpeg: bool = False
    gpus_per_actor: float = 1.0
    cpus_per_actor: float | None = None
    rows_per_file: int = 256

    def __post_init__(self) -> None:
        for name in ("batch_size", "actors", "rows_per_file"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, not {value}")
        for name in ("gpus_per_actor", "cpus_per_actor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} must be above 0, not {value:g}")
        if self.path_column and self.bytes_column:
            raise SettingsError("a manifest has either a path column or a bytes column: give one of the two")
        if self.bytes_column and not self.id_column:
            raise SettingsError(
                f"bytes (column {self.bytes_column!r}) have no name of their own: give the id column too"
            )
        if self.format not in FORMATS:
            raise SettingsError(f"format {self.format!r} is unknown; known are {', '.join(FORMATS)}")
        if bool(self.qdrant) != bool(self.collection):
            raise SettingsError("--qdrant says where and --collection what: give both of them or none")
        if self.points is not None and self.points.is_folder and (self.actors or 1) > 1:
            raise SettingsError(f"the folder {self.qdrant!r} is for one encoder; give a server's URL, or --actors 1")
        self.tolerance  # noqa: B018  # raises what is wrong with it
        kind = self.device.partition(":")[0]
        if kind not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"device {self.device!r} is unknown; known are auto, cpu and cuda")
        self.engine_on(gpu=kind == "cuda")

    @property
    def tolerance(self) -> Tolerance | None:
        return None if self.max_failures is None else Tolerance.parse(self.max_failures)

    @property
    def points(self) -> Collection | None:
        """The Qdrant collection to fill, if there is one."""
        if not (self.qdrant and self.collection):
            return None
        # A folder by its whole path: encoders on a cluster have other working directories.
        place = self.qdrant if is_uri(self.qdrant) else os.path.abspath(os.path.expanduser(self.qdrant))
        return Collection(place, self.collection, self.qdrant_api_key)

    @property
    def encoders(self) -> int | None:
        """`actors`, or the one that a Qdrant folder can have."""
        return 1 if self.points is not None and self.points.is_folder else self.actors

    @property
    def settled_device(self) -> str:
        """`device`, or cpu where the engine or the precision is one of CPUs alone."""
        return settle_device(self.device, self.engine, self.precision)

    def engine_on(self, *, gpu: bool) -> str:
        """The engine that encoders on GPUs, or on CPUs, run with. Raises SettingsError if there is none."""
        return choose_engine(self.engine, "cuda" if gpu else "cpu", self.precision)
