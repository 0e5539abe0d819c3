"""`clipfleet index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import WRONG_USAGE, reported, say

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet index photos/ --model tiny  (then: clipfleet serve --model tiny --index clipfleet-index)  |  "
    "clipfleet index photos/ --into http://qdrant:6333 --collection products"
)
def index(
    source: options.Source,
    folder: Annotated[
        Path,
        typer.Option(help="Where the vectors are kept, from which a killed run goes on, and without --into the index."),
    ] = Path("clipfleet-index"),
    into: Annotated[
        str | None, typer.Option(help="The URL of a Qdrant server; default: Qdrant's files in FOLDER.")
    ] = None,
    collection: Annotated[str, typer.Option(help="The Qdrant collection; made if it is not there.")] = "images",
    qdrant_api_key: options.QdrantKey = None,
    thumbnails: Annotated[bool, typer.Option(help="Keep a small picture of each image in the collection.")] = True,
    model: options.Model = options.DEFAULT_MODEL,
    path_column: options.PathColumn = None,
    bytes_column: options.BytesColumn = None,
    id_column: options.IdColumn = None,
    retry_errors: options.RetryErrors = False,
    device: options.JobDevice = "auto",
    precision: options.Precision = "float32",
    engine: options.JobEngine = "auto",
    reduced_jpeg: options.ReducedJpeg = False,
    actors: options.Actors = None,
    address: options.Address = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a collection of images ready to be searched, or bring it up to date: new and changed files are embedded, those that
    have gone are removed. It is `clipfleet embed --changed` with a Qdrant collection; ends with the same statuses."""
    with reported("serve", WRONG_USAGE):
        from clipfleet.qdrant import index_folder
        from jobs.embed_images import run
        from jobs.options import EmbedOptions

        summary = run(
            EmbedOptions(
                source=source,
                dest=str(folder / "vectors"),
                model=model,
                path_column=path_column,
                bytes_column=bytes_column,
                id_column=id_column,
                retry_errors=retry_errors,
                changed=bytes_column is None,
                qdrant=into or str(index_folder(folder)),
                collection=collection,
                qdrant_api_key=qdrant_api_key,
                thumbnails=thumbnails,
                device=device,
                precision=precision,
                engine=engine,
                reduced_jpeg=reduced_jpeg,
                actors=actors,
                address=address,
            )
        )
        say(summary, as_json)
        raise typer.Exit(summary.exit_status)
