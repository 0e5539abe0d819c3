"""What a replica's log looks like, in both forms."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
from loguru import logger
from deployments import logs

logs.set_up({form!r})
logger.debug("not shown")
logger.info("a start")
with logger.contextualize(request="shop-42"):
    logger.warning("odd: {{}}", {{"braces": "{{}}"}})
    try:
        1 / 0
    except ZeroDivisionError as error:
        logger.opt(exception=error).error("a failure")
"""


def said(form: str) -> str:
    done = subprocess.run([sys.executable, "-c", CODE.format(form=form)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_words() -> None:
    first, second, third, *rest = said("text").splitlines()
    assert first.endswith("INFO __main__: a start")
    assert second.endswith("WARNING __main__: odd: {'braces': '{}'} request=shop-42")
    assert third.endswith("ERROR __main__: a failure request=shop-42") and "ZeroDivisionError" in rest[-1]


def test_json() -> None:
    first, second, third = map(json.loads, said("json").splitlines())
    assert (first["level"], first["message"], "request" in first) == ("INFO", "a start", False)
    assert (second["level"], second["logger"], second["request"]) == ("WARNING", "__main__", "shop-42")
    assert second["message"] == "odd: {'braces': '{}'}" and second["time"][:2] == "20"
    assert "ZeroDivisionError" in third["exception"]
