"""Runs blocks of Python for test_seed_page.py: `python -m tests.run_blocks < blocks.json > results.json`.

Each block runs as it is written, one statement after the other, in a namespace and a folder of its own. A bare
await is legal, as in a notebook. A statement that raises is noted, and the next one runs.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import io
import json
import os
import sys
import warnings
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from loguru import logger
from PIL import Image

from app.models.clip_model import CLIPEmbedder


def run(source: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run one block; gives what its statements raised, warned of, printed and assigned."""
    raised, assigned, printed = [], [], io.StringIO()
    with asyncio.Runner() as loop, warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
        warnings.simplefilter("always", DeprecationWarning)
        for statement in ast.parse(source).body:
            module = ast.Module([statement], type_ignores=[])
            code = compile(module, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            try:
                result = eval(code, namespace)
                if inspect.iscoroutine(result):
                    loop.run(result)
            except Exception as error:
                kinds = [kind.__name__ for kind in type(error).__mro__]
                raised.append({"statement": ast.unparse(statement), "kinds": kinds, "message": str(error)})
                continue
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                assigned.append([statement.targets[0].id, describe(namespace[statement.targets[0].id])])
    return {
        "raised": raised,
        "warned": [f"{item.category.__name__}: {item.message}" for item in caught],
        "printed": printed.getvalue(),
        "assigned": assigned,
    }


def describe(value: Any) -> Any:
    """What a test wants to know of a variable: arrays as their shape."""
    if isinstance(value, np.ndarray):
        return list(value.shape)
    if isinstance(value, list):
        return [describe(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def stand_ins(embedder: CLIPEmbedder) -> dict[str, Any]:
    """The names that the page's blocks take for granted."""
    image, text = embedder.encode_text(["one vector", "another"])
    return {
        "asyncio": asyncio,
        "np": np,
        "CLIPEmbedder": CLIPEmbedder,
        "embedder": embedder,
        "image_paths": ["path/to/image1.jpg", "path/to/image2.jpg", "path/to/image3.jpg"],
        "img_embedding": image,
        "text_embedding": text,
        "pil_image": Image.open("image.jpg"),
    }


def main() -> None:
    results = []
    with CLIPEmbedder(device="cpu") as embedder:
        for block in json.load(sys.stdin):
            os.chdir(block["folder"])
            results.append(run(block["source"], stand_ins(embedder)))
            logger.remove()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
