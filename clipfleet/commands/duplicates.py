"""`clipfleet duplicates`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipfleet.commands import options
from clipfleet.commands.reporting import reported

app = typer.Typer()


@app.command(
    epilog="Examples:  clipfleet duplicates vectors/ --page duplicates.html  |  clipfleet duplicates vectors/ --threshold 0.99 "
    "--out duplicates.csv"
)
def duplicates(
    dest: Annotated[Path, typer.Argument(help="A job's DEST.")],
    threshold: Annotated[float, typer.Option(help="Least cosine of a pair.")] = 0.97,
    out: Annotated[Path | None, typer.Option(help="Write the table here: .parquet, .csv or .jsonl.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page of thumbnails here.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Find groups of images that are nearly the same, by comparing each vector of DEST with each other one."""
    with reported("serve"):
        from jobs.duplicates import as_table, check_out, find, write_page, write_table

        if out is not None:
            check_out(out)
        if page is not None:
            check_out(page, ())
        groups = find(dest, threshold)
        if out is not None:
            write_table(groups, out)
        if page is not None:
            write_page(groups, page, threshold)
        for row in as_table(groups).to_pylist() if as_json else ():
            typer.echo(json.dumps(row, ensure_ascii=False))
        if not as_json:
            typer.echo(f"{len(groups)} groups, {sum(map(len, groups))} images")
