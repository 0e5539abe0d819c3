"""How a command ends: its result on stdout, one line of what went wrong on stderr, and its status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from clipfleet.errors import ClipfleetError, SettingsError

STOPPED, WRONG_USAGE, FAILED_ROWS = 1, 2, 3
_EXTRAS = (
    "torch", "transformers", "PIL", "loguru", "huggingface_hub", "safetensors", "sentencepiece", "tokenizers",
    "ray", "fastapi", "starlette", "orjson", "pyarrow", "grpc",
)  # fmt: skip


@contextmanager
def reported(extra: str, wrong_settings: int = STOPPED) -> Iterator[None]:
    """End with status 1 and one line for what is not a bug of ours; wrong settings may have a status of their own.

    `extra` is what brings all that the command needs.
    """
    try:
        yield
    except ClipfleetError as error:
        fail(str(error), wrong_settings if isinstance(error, SettingsError) else STOPPED)
    except KeyboardInterrupt:
        fail("interrupted")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        fail(f"this command needs {missing}: pip install 'clipfleet[{extra}]'")


def fail(message: str, status: int = STOPPED) -> None:
    """End the command with one line on stderr."""
    typer.echo(f"clipfleet: {message}", err=True)
    raise typer.Exit(status)


def say(what: Any, as_json: bool) -> None:
    """Print a result as words, or as what its as_json gives."""
    typer.echo(json.dumps(what.as_json(), ensure_ascii=False) if as_json else str(what))
