"""/docs and the request schemas of /openapi.json, made from the types that validate.

The page is plain HTML: unlike the framework's own, it loads nothing from another host.
"""

from __future__ import annotations

from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deployments.schemas import EmbeddingsRequest, RankRequest

_REF = "#/components/schemas/"
_FILES = {
    "type": "object",
    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"application/json": {"schema": {"$ref": _REF + "EmbeddingsRequest"}}},
    "/v1/embeddings/images": {
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
        "multipart/form-data": {"schema": _FILES},
    },
    "/v1/rank": {"application/json": {"schema": {"$ref": _REF + "RankRequest"}}},
}


def add_schemas(app: FastAPI) -> None:
    """Let the application's OpenAPI document show the bodies that the routes read by themselves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # the hook that FastAPI documents for this


def _document(app: FastAPI) -> dict[str, Any]:
    from clipfleet import __version__

    document = get_openapi(
        title="clipfleet",
        version=__version__,
        description="CLIP vectors for images and texts.",
        routes=app.routes,
    )
    known = document["components"]["schemas"]
    for kind in (EmbeddingsRequest, RankRequest):
        schema = kind.model_json_schema(ref_template=_REF + "{model}")
        known.update(schema.pop("$defs", {}))
        known[kind.__name__] = schema
    for path, content in _BODIES.items():
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    for name in ("HTTPValidationError", "ValidationError"):  # ours answer 400 with ErrorResponse
        known.pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    npy = document["paths"]["/v1/embeddings/images"]["post"]["responses"]["200"]["content"]
    npy["application/x-npy"] = _BINARY
    return document


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: .75rem; background: #8881; border-radius: .4rem; font-size: .85rem; }
h2 { margin-top: 2.5rem; } code { font-size: .95em; } :root { color-scheme: light dark; }
"""


def render(document: dict[str, Any]) -> str:
    """The OpenAPI document as one HTML page."""
    routes = "".join(
        _route(method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    types = "".join(
        f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3>{_json(schema)}'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    title = f"{escape(document['info']['title'])} {escape(document['info']['version'])}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{escape(document['info']['description'])} "
        f'The same as <a href="openapi.json">openapi.json</a>.</p>{routes}<h2>Types</h2>{types}</body></html>'
    )


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    shown = {key: operation[key] for key in ("parameters", "requestBody") if key in operation}
    answers = operation["responses"]["200"]["content"]
    return (
        f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
        f"{_json(shown) if shown else ''}<p>Answers:</p>{_json(answers)}"
    )


def _json(content: Any) -> str:
    return f"<pre>{escape(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())}</pre>"
