"""`clipfleet keys add`, `list` and `revoke`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import reported

app = typer.Typer(help="API keys by name, in a file that holds their hashes alone.", no_args_is_help=True)
_KeyFile = Annotated[Path, typer.Option("--file", envvar="CLIPFLEET_API_KEYS_FILE", help="The file of the keys.")]
_KeyName = Annotated[str, typer.Argument(help="Whose key it is, such as search-page.")]


@app.command("add", epilog="Example:  clipfleet keys add search-page --file keys.txt")
def add_key_command(name: _KeyName, file: _KeyFile) -> None:
    """Make a key and print it, this once. Services that read the file accept it within a second or so."""
    with reported("local"):
        from clipfleet.keys import add_key

        typer.echo(add_key(file, name))


@app.command("list")
def list_keys_command(file: _KeyFile, as_json: options.AsJson = False) -> None:
    """Print the names of the keys."""
    with reported("local"):
        from clipfleet.keys import read_keys

        for name in read_keys(file):
            typer.echo(json.dumps({"name": name}) if as_json else name)


@app.command("revoke")
def revoke_key_command(name: _KeyName, file: _KeyFile) -> None:
    """Remove a key. Services that read the file refuse it within a second or so."""
    with reported("local"):
        from clipfleet.keys import revoke_key

        revoke_key(file, name)
