"""What a person may ask of the job."""

from __future__ import annotations

from dataclasses import dataclass

from clipfleet.engines import choose_engine, settle_device
from clipfleet.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """One run of the job. Raises SettingsError for values that cannot be.

    `source` is a folder, a glob, or a manifest (.parquet, .csv, .tsv, .jsonl); `dest` is a local folder.
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
        kind = self.device.partition(":")[0]
        if kind not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"device {self.device!r} is unknown; known are auto, cpu and cuda")
        self.engine_on(gpu=kind == "cuda")

    @property
    def settled_device(self) -> str:
        """`device`, or cpu where the engine or the precision is one of CPUs alone."""
        return settle_device(self.device, self.engine, self.precision)

    def engine_on(self, *, gpu: bool) -> str:
        """The engine that encoders on GPUs, or on CPUs, run with. Raises SettingsError if there is none."""
        return choose_engine(self.engine, "cuda" if gpu else "cpu", self.precision)
