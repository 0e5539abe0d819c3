"""The `clipfleet` command: what it is made of, and how its process ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from clipfleet import __version__
from clipfleet.commands import bench, doctor, duplicates, embed, encode, index, keys, models, plan, serve

app = typer.Typer(
    name="clipfleet",
    help="CLIP vectors for images and texts: in process, over HTTP and in bulk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"clipfleet {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """CLIP vectors for images and texts: in process, over HTTP and in bulk."""


for command in (serve, embed, index, duplicates, encode, models, bench, plan, doctor):  # as --help lists them
    app.add_typer(command.app)
app.add_typer(keys.app, name="keys")


def run(arguments: list[str] | None = None) -> NoReturn:
    """The console script. `arguments` are those of the process by default."""
    status = 1
    try:
        app(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        with suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
    if "ray" in sys.modules:
        # All is done and closed by now. Ray's threads may abort or hang in Python's own exit, above all when Ray ends
        # soon after it started.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
