"""`clipfleet bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import FAILED_ROWS, reported, say

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet bench http://127.0.0.1:8000  |  clipfleet bench http://127.0.0.1:8000 photos/*.jpg "
    "--clients 64 --requests 1000"
)
def bench(
    url: Annotated[str, typer.Argument(help="A running service.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files to send; default: drawn ones.")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="Send texts, all different, instead of images.")] = False,
    clients: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 200,
    items: Annotated[int, typer.Option(min=1, help="Images or texts in one request.")] = 1,
    api_key: options.ApiKey = None,
    as_json: options.AsJson = False,
) -> None:
    """Load a running service and print its throughput and percentiles. Ends with status 3 if a request failed."""
    with reported("local"):
        from clipfleet.bench import bench as run_bench

        result = run_bench(
            url, images=images or [], texts=texts, clients=clients, requests=requests, items=items, api_key=api_key
        )
        say(result, as_json)
        raise typer.Exit(FAILED_ROWS if result.failures or not result.items else 0)
