"""`clipfleet plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import reported, say

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet plan photos/ --model tiny  |  clipfleet plan photos/ --precision int8 --core-price 0.04 "
    "--out mine.yaml  (then: clipfleet serve mine.yaml)"
)
def plan(
    source: Annotated[Path | None, typer.Argument(help="A folder of images like yours; default: drawn ones.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
    engine: options.Engine = "auto",
    reduced_jpeg: options.ReducedJpeg = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of an encoder on a CPU; default: up to 4.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Images of SOURCE to measure.")] = 64,
    core_price: Annotated[float, typer.Option(min=0, help="Price of a core for an hour.")] = 0.0,
    gpu_price: Annotated[float, typer.Option(min=0, help="Price of a GPU for an hour.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Write the config file here; otherwise it follows the report on stdout.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure this machine with a checkpoint and images like yours; print what is needed, its price and a config file."""
    with reported("serve"):
        from clipfleet.plan import Plan, Prices, gpu_count, measure, write_config
        from clipfleet.threads import cores

        rates = measure(
            source, model, device=device, precision=precision, engine=engine, reduced_jpeg=reduced_jpeg,
            threads=threads, most=sample, say=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        typer.echo("serving the graph without a model, to measure transport", err=True)
        from deployments.transport import measure_transport

        found = Plan(
            model, precision, reduced_jpeg, rates, *measure_transport(), cores(), gpu_count(),
            Prices(core_price, gpu_price),
        )  # fmt: skip
        say(found, as_json)
        if out is not None:
            write_config(found, out)
            typer.echo(f"wrote {out}; try: clipfleet serve {out}", err=as_json)
        elif not as_json:  # which has it already
            typer.echo(f"\n{found.config()}")
