"""`clipfleet encode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import FAILED_ROWS, reported

app = typer.Typer()


@app.command(epilog="Example:  clipfleet encode --model tiny --text 'a red circle' photo.jpg --out vectors.npy")
def encode(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Write one .npy (n, d), failed rows NaN, instead of JSON lines.")
    ] = None,
) -> None:
    """Turn texts and image files into vectors, texts first. Ends with status 3 if an image failed."""
    texts = text or []
    if not texts and not images:
        raise typer.BadParameter("give at least one --text or image file")
    with reported("local"):
        from clipfleet.encode import encode_all, save_npy

        rows = encode_all(model, device, texts, images or [])
        failed = 0
        if out is not None:
            failed = save_npy(rows, out, on_error=lambda row: typer.echo(f"{row.input}: {row.error}", err=True))
        else:
            for row in rows:
                failed += row.error is not None
                vector = None if row.embedding is None else row.embedding.tolist()
                typer.echo(
                    json.dumps({"input": row.input, "embedding": vector, "error": row.error}, ensure_ascii=False)
                )
        raise typer.Exit(FAILED_ROWS if failed else 0)
