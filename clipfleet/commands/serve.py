"""`clipfleet serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import reported

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet serve demo  |  clipfleet serve --model tiny  |  clipfleet serve my.yaml --port 9000"
)
def serve(
    config: Annotated[str, typer.Argument(help="A Ray Serve config file, or a packaged one by name.")] = "serve_config",
    model: options.AnyModel = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; the file's or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; the file's or 8000.")] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prometheus metrics.")] = 9464,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Serve other machines although no API keys are set.")
    ] = False,
    tls: Annotated[
        Path | None, typer.Option(help="Speak HTTPS with this PEM file: the certificate chain and its private key.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(help="Search this index at /v1/search: a folder of `clipfleet index`, or a Qdrant's URL."),
    ] = None,
    collection: Annotated[str | None, typer.Option(help="The collection of that Qdrant; default: images.")] = None,
) -> None:
    """Serve a checkpoint over HTTP, on a local Ray or on the one that RAY_ADDRESS names. Ctrl-C stops it; SIGHUP has it
    read CONFIG again and change over without failing a request."""
    with reported("serve"):
        from clipfleet.config_file import read_config

        settings = read_config(config)
        from deployments.serve import serve_until_stopped

        serve_until_stopped(
            settings, lambda: read_config(config), model=model, host=host, port=port, metrics_port=metrics_port,
            open_to_all=open_to_all, tls=tls, search=_search(index, collection), say=typer.echo,
        )  # fmt: skip


def _search(index: str | None, collection: str | None) -> dict[str, str] | None:
    """What --index says of `args.search`."""
    if index is None:
        if collection:
            raise typer.BadParameter("--collection needs --index")
        return None
    from clipfleet.qdrant import place_of

    return {"qdrant": place_of(index)} | ({"collection": collection} if collection else {})
