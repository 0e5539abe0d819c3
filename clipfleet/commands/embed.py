"""`clipfleet embed`."""

from __future__ import annotations

from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import WRONG_USAGE, fail, reported, say

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet embed photos/ vectors/ --model tiny  |  "
    "clipfleet embed products.parquet vectors/ --path-column file --id-column sku"
)
def embed(
    source: options.Source,
    dest: Annotated[str, typer.Argument(help="A folder for the output files; finished rows in it are skipped.")],
    model: options.Model = options.DEFAULT_MODEL,
    path_column: options.PathColumn = None,
    bytes_column: options.BytesColumn = None,
    id_column: options.IdColumn = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 32,
    actors: options.Actors = None,
    retry_errors: options.RetryErrors = False,
    changed: Annotated[
        bool,
        typer.Option("--changed", help="Redo files that differ or could not be read; mark rows whose files have gone."),
    ] = False,
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|N%", help="Status 1 where more rows than that failed, in all of DEST.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="parquet, or npy: vectors in .npy files, all else in Parquet.")
    ] = "parquet",
    qdrant: Annotated[str | None, typer.Option(help="Also upload into this Qdrant: a URL, or a folder.")] = None,
    collection: Annotated[str | None, typer.Option(help="The Qdrant collection; made if it is not there.")] = None,
    qdrant_api_key: options.QdrantKey = None,
    address: options.Address = None,
    device: options.JobDevice = "auto",
    precision: options.Precision = "float32",
    engine: options.JobEngine = "auto",
    reduced_jpeg: options.ReducedJpeg = False,
    as_json: options.AsJson = False,
) -> None:
    """Embed many images into files of vectors, streaming and resumable.

    Ends with status 0 (all good), 3 (finished, some rows failed), 1 (stopped, and the same command goes on; or more rows
    failed than --max-failures allows) or 2 (wrong usage). The first Ctrl-C or SIGTERM finishes what is in flight, a
    second one stops at once.
    """
    with reported("serve", WRONG_USAGE):
        from jobs.embed_images import run
        from jobs.options import EmbedOptions

        summary = run(
            EmbedOptions(
                source=source,
                dest=dest,
                model=model,
                path_column=path_column,
                bytes_column=bytes_column,
                id_column=id_column,
                batch_size=batch_size,
                actors=actors,
                retry_errors=retry_errors,
                changed=changed,
                max_failures=max_failures,
                format=format,
                qdrant=qdrant,
                collection=collection,
                qdrant_api_key=qdrant_api_key,
                address=address,
                device=device,
                precision=precision,
                engine=engine,
                reduced_jpeg=reduced_jpeg,
            )
        )
        say(summary, as_json)
        if summary.verdict:
            fail(summary.verdict, summary.exit_status)
        raise typer.Exit(summary.exit_status)
