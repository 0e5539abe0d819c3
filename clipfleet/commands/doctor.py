"""`clipfleet doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import STOPPED, reported

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet doctor  |  clipfleet doctor my.yaml  |  clipfleet doctor --model tiny --dest vectors/"
)
def doctor(
    config: Annotated[str | None, typer.Argument(help="A config file to check, or a packaged one by name.")] = None,
    model: options.AnyModel = None,
    device: options.AnyDevice = None,
    precision: options.AnyPrecision = None,
    engine: options.AnyEngine = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to look at; the file's or 8000.")] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the metrics.")] = 9464,
    dest: Annotated[str | None, typer.Option(help="A job's DEST: can it be kept with that checkpoint?")] = None,
    qdrant: Annotated[str | None, typer.Option(help="A Qdrant with a collection: can it be kept?")] = None,
    collection: Annotated[str | None, typer.Option(help="That collection.")] = None,
    qdrant_api_key: options.QdrantKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what is installed, which device and engine would be used and why, and whether ports, a config file and an index fit.
    Downloads and changes nothing. Ends with status 1 if something does not fit."""
    with reported("local"):
        from clipfleet.doctor import Asked, examine

        asked = Asked(
            config=config,
            model=model,
            device=device,
            precision=precision,
            engine=engine,
            port=port,
            metrics_port=metrics_port,
            dest=dest,
            qdrant=qdrant,
            collection=collection,
            qdrant_api_key=qdrant_api_key,
        )
        problems = 0
        for found in examine(asked):
            problems += found.state == "problem"
            mark = {"good": "  ", "note": "- ", "problem": "! "}[found.state]
            line = json.dumps(found.as_json()) if as_json else f"{mark}{found.about}: {found.said}"
            typer.echo(line)
        raise typer.Exit(STOPPED if problems else 0)
