"""How replicas log: a line of words, or a JSON object a line. A request's name is part of what is said while it is answered."""

from __future__ import annotations

import json
import sys
import traceback
from typing import TYPE_CHECKING

from loguru import logger

from clipfleet.settings import LogFormat

if TYPE_CHECKING:
    from loguru import Message, Record

_WORDS = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level} {name}: {message}"


def set_up(form: LogFormat) -> None:
    """Log to stderr, which Ray keeps in a file for each replica, from INFO up."""
    logger.remove()
    if form == "json":
        logger.add(_write_json, level="INFO")
    else:
        logger.add(sys.stderr, format=_words, level="INFO")


def _words(record: Record) -> str:
    named = " request={extra[request]}" if "request" in record["extra"] else ""
    return f"{_WORDS}{named}\n{{exception}}"


def _write_json(message: Message) -> None:
    record = message.record
    said = {
        "time": record["time"].isoformat(),
        "level": record["level"].name,
        "logger": record["name"],
        "message": record["message"],
        **record["extra"],
    }
    if (error := record["exception"]) is not None:
        said["exception"] = "".join(traceback.format_exception(error.type, error.value, error.traceback))
    print(json.dumps(said, default=str), file=sys.stderr, flush=True)
