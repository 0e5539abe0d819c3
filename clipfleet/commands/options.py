"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
_MODEL_HELP = "Checkpoint: tiny (embedded), a folder, a hub id, or id@revision."
_DEVICE_HELP = "auto, cpu, cuda or cuda:N."
_PRECISION_HELP = "float32, float16, bfloat16, or int8 on CPUs."
_ENGINE_HELP = "auto, torch or openvino."

RetryErrors = Annotated[bool, typer.Option("--retry-errors", help="Redo the rows that failed before.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]

# Those of a checkpoint in this process; the Any ones leave it to a config file.
Model = Annotated[str, typer.Option(help=_MODEL_HELP)]
AnyModel = Annotated[str | None, typer.Option(help=_MODEL_HELP)]
Device = Annotated[str, typer.Option(help=_DEVICE_HELP)]
AnyDevice = Annotated[str | None, typer.Option(help=_DEVICE_HELP)]
Precision = Annotated[str, typer.Option(help=_PRECISION_HELP)]
AnyPrecision = Annotated[str | None, typer.Option(help=_PRECISION_HELP)]
Engine = Annotated[str, typer.Option(help=_ENGINE_HELP)]
AnyEngine = Annotated[str | None, typer.Option(help=_ENGINE_HELP)]
ReducedJpeg = Annotated[
    bool, typer.Option("--reduced-jpeg", help="Decode large JPEGs at a fraction of their size: faster, less exact.")
]

# Those of the job.
Source = Annotated[str, typer.Argument(help="A folder, a glob, tars, or a manifest (.parquet, .csv, .tsv, .jsonl).")]
PathColumn = Annotated[str | None, typer.Option(help="The manifest's column of image paths.")]
BytesColumn = Annotated[str | None, typer.Option(help="The manifest's column of image bytes.")]
IdColumn = Annotated[str | None, typer.Option(help="The manifest's column of ids; default: the path.")]
QdrantKey = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="Key of that Qdrant.")]
Address = Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="A running Ray; default: its own.")]
Actors = Annotated[int | None, typer.Option(min=1, help="Encoders; default: one a GPU, or by CPUs.")]
JobDevice = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
JobEngine = Annotated[str, typer.Option(help="auto, torch or openvino (CPUs; auto takes it if installed).")]

# Those of a running service.
ApiKey = Annotated[str | None, typer.Option(envvar="CLIPFLEET_API_KEY", help="Key of that service.")]
