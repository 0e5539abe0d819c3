"""The `clipfleet` command: parse, one library call, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from clipfleet import __version__
from clipfleet.errors import ClipfleetError, SettingsError

app = typer.Typer(
    name="clipfleet",
    help="CLIP vectors for images and texts: in process, over HTTP and in bulk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

STOPPED, WRONG_USAGE, FAILED_ROWS = 1, 2, 3
_DEFAULT_MODEL = "openai/clip-vit-base-patch32"
_MODEL_HELP = "Checkpoint: tiny (embedded), a folder, a hub id, or id@revision."
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
_Source = Annotated[str, typer.Argument(help="A folder, a glob, tars, or a manifest (.parquet, .csv, .tsv, .jsonl).")]
_PathColumn = Annotated[str | None, typer.Option(help="The manifest's column of image paths.")]
_BytesColumn = Annotated[str | None, typer.Option(help="The manifest's column of image bytes.")]
_IdColumn = Annotated[str | None, typer.Option(help="The manifest's column of ids; default: the path.")]
_QdrantKey = Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="Key of that Qdrant.")]
_Address = Annotated[str | None, typer.Option(envvar="RAY_ADDRESS", help="A running Ray; default: its own.")]
_Actors = Annotated[int | None, typer.Option(min=1, help="Encoders; default: one a GPU, or by CPUs.")]
_JobDevice = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Precision = Annotated[str, typer.Option(help="float32, float16, bfloat16, or int8 on CPUs.")]
_JobEngine = Annotated[str, typer.Option(help="auto, torch or openvino (CPUs; auto takes it if installed).")]
_ReducedJpeg = Annotated[
    bool, typer.Option("--reduced-jpeg", help="Decode large JPEGs at a fraction of their size: faster, less exact.")
]
_ApiKey = Annotated[str | None, typer.Option(envvar="CLIPFLEET_API_KEY", help="Key of that service.")]
_EXTRAS = (
    "torch", "transformers", "PIL", "loguru", "huggingface_hub", "safetensors", "sentencepiece", "tokenizers",
    "ray", "fastapi", "starlette", "orjson", "pyarrow", "grpc",
)  # fmt: skip


@contextmanager
def _reported(extra: str, wrong_settings: int = STOPPED) -> Iterator[None]:
    """End with status 1 and one line for what is not a bug of ours; wrong settings may have a status of their own.

    `extra` is what brings all that the command needs.
    """
    try:
        yield
    except ClipfleetError as error:
        _fail(str(error), wrong_settings if isinstance(error, SettingsError) else STOPPED)
    except KeyboardInterrupt:
        _fail("interrupted")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        _fail(f"this command needs {missing}: pip install 'clipfleet[{extra}]'")


def _fail(message: str, status: int = STOPPED) -> None:
    typer.echo(f"clipfleet: {message}", err=True)
    raise typer.Exit(status)


def _say(what: Any, as_json: bool) -> None:
    """Print a result as words, or as what its as_json gives."""
    typer.echo(json.dumps(what.as_json(), ensure_ascii=False) if as_json else str(what))


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


@app.command(
    epilog="Examples:  clipfleet serve demo  |  clipfleet serve --model tiny  |  clipfleet serve my.yaml --port 9000"
)
def serve(
    config: Annotated[str, typer.Argument(help="A Ray Serve config file, or a packaged one by name.")] = "serve_config",
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
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
    with _reported("serve"):
        from clipfleet.settings import read_config

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


@app.command(
    epilog="Examples:  clipfleet embed photos/ vectors/ --model tiny  |  "
    "clipfleet embed products.parquet vectors/ --path-column file --id-column sku"
)
def embed(
    source: _Source,
    dest: Annotated[str, typer.Argument(help="A folder for the output files; finished rows in it are skipped.")],
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = _DEFAULT_MODEL,
    path_column: _PathColumn = None,
    bytes_column: _BytesColumn = None,
    id_column: _IdColumn = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 32,
    actors: _Actors = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Redo the rows that failed before.")] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Redo files whose size or time differs; mark rows whose files have gone.")
    ] = False,
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|N%", help="Status 1 where more rows than that failed, in all of DEST.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="parquet, or npy: vectors in .npy files, all else in Parquet.")
    ] = "parquet",
    qdrant: Annotated[str | None, typer.Option(help="Also upload into this Qdrant: a URL, or a folder.")] = None,
    collection: Annotated[str | None, typer.Option(help="The Qdrant collection; made if it is not there.")] = None,
    qdrant_api_key: _QdrantKey = None,
    address: _Address = None,
    device: _JobDevice = "auto",
    precision: _Precision = "float32",
    engine: _JobEngine = "auto",
    reduced_jpeg: _ReducedJpeg = False,
    as_json: _AsJson = False,
) -> None:
    """Embed many images into files of vectors, streaming and resumable.

    Ends with status 0 (all good), 3 (finished, some rows failed), 1 (stopped, and the same command goes on; or more rows
    failed than --max-failures allows) or 2 (wrong usage). The first Ctrl-C or SIGTERM finishes what is in flight, a
    second one stops at once.
    """
    with _reported("serve", WRONG_USAGE):
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
        _say(summary, as_json)
        if summary.verdict:
            _fail(summary.verdict, summary.exit_status)
        raise typer.Exit(summary.exit_status)


@app.command(
    epilog="Examples:  clipfleet index photos/ --model tiny  (then: clipfleet serve --model tiny --index clipfleet-index)  |  "
    "clipfleet index photos/ --into http://qdrant:6333 --collection products"
)
def index(
    source: _Source,
    folder: Annotated[
        Path,
        typer.Option(help="Where the vectors are kept, from which a killed run goes on, and without --into the index."),
    ] = Path("clipfleet-index"),
    into: Annotated[
        str | None, typer.Option(help="The URL of a Qdrant server; default: Qdrant's files in FOLDER.")
    ] = None,
    collection: Annotated[str, typer.Option(help="The Qdrant collection; made if it is not there.")] = "images",
    qdrant_api_key: _QdrantKey = None,
    thumbnails: Annotated[bool, typer.Option(help="Keep a small picture of each image in the collection.")] = True,
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = _DEFAULT_MODEL,
    path_column: _PathColumn = None,
    bytes_column: _BytesColumn = None,
    id_column: _IdColumn = None,
    device: _JobDevice = "auto",
    precision: _Precision = "float32",
    engine: _JobEngine = "auto",
    reduced_jpeg: _ReducedJpeg = False,
    actors: _Actors = None,
    address: _Address = None,
    as_json: _AsJson = False,
) -> None:
    """Make a collection of images ready to be searched, or bring it up to date: new and changed files are embedded, those that
    have gone are removed. It is `clipfleet embed --changed` with a Qdrant collection; ends with the same statuses."""
    with _reported("serve", WRONG_USAGE):
        from clipfleet.qdrant import index_folder
        from jobs.embed_images import run
        from jobs.options import EmbedOptions

        summary = run(
            EmbedOptions(
                source=source,
                dest=str(folder / "vectors"),
                model=model,
                path_column=path_column,
                bytes_column=bytes_column,
                id_column=id_column,
                changed=bytes_column is None,
                qdrant=into or str(index_folder(folder)),
                collection=collection,
                qdrant_api_key=qdrant_api_key,
                thumbnails=thumbnails,
                device=device,
                precision=precision,
                engine=engine,
                reduced_jpeg=reduced_jpeg,
                actors=actors,
                address=address,
            )
        )
        _say(summary, as_json)
        raise typer.Exit(summary.exit_status)


@app.command(
    epilog="Examples:  clipfleet duplicates vectors/ --page duplicates.html  |  clipfleet duplicates vectors/ --threshold 0.99 "
    "--out duplicates.csv"
)
def duplicates(
    dest: Annotated[Path, typer.Argument(help="A job's DEST.")],
    threshold: Annotated[float, typer.Option(help="Least cosine of a pair.")] = 0.97,
    out: Annotated[Path | None, typer.Option(help="Write the table here: .parquet, .csv or .jsonl.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page of thumbnails here.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Find groups of images that are nearly the same, by comparing each vector of DEST with each other one."""
    with _reported("serve"):
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


@app.command(epilog="Example:  clipfleet encode --model tiny --text 'a red circle' photo.jpg --out vectors.npy")
def encode(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = _DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Write one .npy (n, d), failed rows NaN, instead of JSON lines.")
    ] = None,
) -> None:
    """Turn texts and image files into vectors, texts first. Ends with status 3 if an image failed."""
    texts = text or []
    if not texts and not images:
        raise typer.BadParameter("give at least one --text or image file")
    with _reported("local"):
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


@app.command(epilog="Examples:  clipfleet models  |  clipfleet models --url http://127.0.0.1:8000")
def models(
    url: Annotated[str | None, typer.Option(help="A running service; without it, what loads offline.")] = None,
    api_key: _ApiKey = None,
) -> None:
    """List a service's models, or the checkpoints that load offline (tiny and the hub cache)."""
    with _reported("local"):
        for entry in _models(url, api_key):
            typer.echo(json.dumps(entry, ensure_ascii=False))


def _models(url: str | None, api_key: str | None) -> Iterable[dict[str, Any]]:
    if url is None:
        from clipfleet.catalogue import offline_models

        return offline_models()
    from clipfleet.client import Client

    with Client(url, api_key, deadline_s=3) as client:
        return client.models()


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
    api_key: _ApiKey = None,
    as_json: _AsJson = False,
) -> None:
    """Load a running service and print its throughput and percentiles. Ends with status 3 if a request failed."""
    with _reported("local"):
        from clipfleet.bench import bench as run_bench

        result = run_bench(
            url, images=images or [], texts=texts, clients=clients, requests=requests, items=items, api_key=api_key
        )
        _say(result, as_json)
        raise typer.Exit(FAILED_ROWS if result.failures or not result.items else 0)


@app.command(
    epilog="Examples:  clipfleet plan photos/ --model tiny  |  clipfleet plan photos/ --precision int8 --core-price 0.04 "
    "--out mine.yaml  (then: clipfleet serve mine.yaml)"
)
def plan(
    source: Annotated[Path | None, typer.Argument(help="A folder of images like yours; default: drawn ones.")] = None,
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = _DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: _Precision = "float32",
    engine: Annotated[str, typer.Option(help="auto, torch or openvino.")] = "auto",
    reduced_jpeg: _ReducedJpeg = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of an encoder on a CPU; default: up to 4.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Images of SOURCE to measure.")] = 64,
    core_price: Annotated[float, typer.Option(min=0, help="Price of a core for an hour.")] = 0.0,
    gpu_price: Annotated[float, typer.Option(min=0, help="Price of a GPU for an hour.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Write the config file here; otherwise it follows the report on stdout.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Measure this machine with a checkpoint and images like yours; print what is needed, its price and a config file."""
    with _reported("serve"):
        from clipfleet.plan import Plan, Prices, gpu_count, measure, write_config
        from clipfleet.threads import cores

        rates = measure(
            source, model, device=device, precision=precision, engine=engine, reduced_jpeg=reduced_jpeg,
            threads=threads, most=sample, say=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
        typer.echo("serving the graph without a model, to measure transport", err=True)
        from deployments.transport import measure_transport

        found = Plan(
            model, precision, reduced_jpeg, rates, measure_transport().rate, cores(), gpu_count(),
            Prices(core_price, gpu_price),
        )  # fmt: skip
        _say(found, as_json)
        if out is not None:
            write_config(found, out)
            typer.echo(f"wrote {out}; try: clipfleet serve {out}", err=as_json)
        elif not as_json:  # which has it already
            typer.echo(f"\n{found.config()}")


@app.command(
    epilog="Examples:  clipfleet doctor  |  clipfleet doctor my.yaml  |  clipfleet doctor --model tiny --dest vectors/"
)
def doctor(
    config: Annotated[str | None, typer.Argument(help="A config file to check, or a packaged one by name.")] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, or int8 on CPUs.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, torch or openvino.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to look at; the file's or 8000.")] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the metrics.")] = 9464,
    dest: Annotated[str | None, typer.Option(help="A job's DEST: can it be kept with that checkpoint?")] = None,
    qdrant: Annotated[str | None, typer.Option(help="A Qdrant with a collection: can it be kept?")] = None,
    collection: Annotated[str | None, typer.Option(help="That collection.")] = None,
    qdrant_api_key: _QdrantKey = None,
    as_json: _AsJson = False,
) -> None:
    """Say what is installed, which device and engine would be used and why, and whether ports, a config file and an index fit.
    Downloads and changes nothing. Ends with status 1 if something does not fit."""
    with _reported("local"):
        from clipfleet.doctor import examine

        problems = 0
        for found in examine(
            config, model, device, precision, engine, port, metrics_port, dest, qdrant, collection, qdrant_api_key
        ):
            problems += found.state == "problem"
            mark = {"good": "  ", "note": "- ", "problem": "! "}[found.state]
            line = json.dumps(found.as_json()) if as_json else f"{mark}{found.about}: {found.said}"
            typer.echo(line)
        raise typer.Exit(STOPPED if problems else 0)


keys = typer.Typer(help="API keys by name, in a file that holds their hashes alone.", no_args_is_help=True)
app.add_typer(keys, name="keys")
_KeyFile = Annotated[Path, typer.Option("--file", envvar="CLIPFLEET_API_KEYS_FILE", help="The file of the keys.")]
_KeyName = Annotated[str, typer.Argument(help="Whose key it is, such as search-page.")]


@keys.command("add", epilog="Example:  clipfleet keys add search-page --file keys.txt")
def add_key_command(name: _KeyName, file: _KeyFile) -> None:
    """Make a key and print it, this once. Services that read the file accept it within a second or so."""
    with _reported("local"):
        from clipfleet.keys import add_key

        typer.echo(add_key(file, name))


@keys.command("list")
def list_keys_command(file: _KeyFile, as_json: _AsJson = False) -> None:
    """Print the names of the keys."""
    with _reported("local"):
        from clipfleet.keys import read_keys

        for name in read_keys(file):
            typer.echo(json.dumps({"name": name}) if as_json else name)


@keys.command("revoke")
def revoke_key_command(name: _KeyName, file: _KeyFile) -> None:
    """Remove a key. Services that read the file refuse it within a second or so."""
    with _reported("local"):
        from clipfleet.keys import revoke_key

        revoke_key(file, name)


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
