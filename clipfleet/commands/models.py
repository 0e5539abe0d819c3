"""`clipfleet models`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import reported

app = typer.Typer()


@app.command(epilog="Examples:  clipfleet models  |  clipfleet models --url http://127.0.0.1:8000")
def models(
    url: Annotated[str | None, typer.Option(help="A running service; without it, what loads offline.")] = None,
    api_key: options.ApiKey = None,
) -> None:
    """List a service's models, or the checkpoints that load offline (tiny and the hub cache)."""
    with reported("local"):
        for entry in _models(url, api_key):
            typer.echo(json.dumps(entry, ensure_ascii=False))


def _models(url: str | None, api_key: str | None) -> Iterable[dict[str, Any]]:
    if url is None:
        from clipfleet.catalogue import offline_models

        return offline_models()
    from clipfleet.client import Client

    with Client(url, api_key, deadline_s=3) as client:
        return client.models()
