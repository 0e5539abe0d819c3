"""/docs and the request schemas of /openapi.json, made from the types that validate.

The page is plain HTML: unlike the framework's own, it loads nothing from another host.
"""

from __future__ import annotations

from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deployments.schemas import EmbeddingsRequest, RankRequest, SearchRequest, Wire
from deployments.weaviate import VectorizeRequest

_REF = "#/components/schemas/"
_FILES = {
    "type": "object",
    "properties": {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "Images, in order."}
    },
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD: dict[str, Any] = {
    "image/*": _BINARY,
    "application/octet-stream": _BINARY,
    "multipart/form-data": {"schema": _FILES, "encoding": {"files": {"contentType": "image/*"}}},
}
_JSON_BODIES: dict[str, type[Wire]] = {
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/rank": RankRequest,
    "/v1/search": SearchRequest,
    "/embeddings": EmbeddingsRequest,  # InfinityRequest has the same fields
    "/vectorize": VectorizeRequest,
}
_DEADLINE = {
    "name": "X-Deadline-Ms",
    "in": "header",
    "required": False,
    "description": "A deadline sooner than the service's own, in milliseconds from now.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10**15 - 1},
}
_ERRORS = {"description": "The bad rows: a JSON list of index and code.", "schema": {"type": "string"}}
_KEYS = {"apiKey": {"type": "http", "scheme": "bearer"}}


def add_schemas(app: FastAPI, *, asks_keys: bool) -> None:
    """Let the application's OpenAPI document show what the routes read by themselves: bodies, the deadline, the key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, asks_keys)
        return app.openapi_schema

    app.openapi = openapi  # the hook that FastAPI documents for this


def _document(app: FastAPI, asks_keys: bool) -> dict[str, Any]:
    from clipfleet import __version__

    document = get_openapi(
        title="clipfleet",
        version=__version__,
        description="CLIP vectors for images and texts.",
        routes=app.routes,
    )
    known, paths = document["components"]["schemas"], document["paths"]
    _add_body(paths["/v1/embeddings/images"]["post"], _UPLOAD)
    for path, kind in _JSON_BODIES.items():
        if path not in paths:  # one of another service, or /v1/search where there is no collection
            continue
        schema = kind.model_json_schema(ref_template=_REF + "{model}")
        known.update(schema.pop("$defs", {}))
        known[kind.__name__] = schema
        _add_body(paths[path]["post"], {"application/json": {"schema": {"$ref": _REF + kind.__name__}}})
    _without_the_frameworks_errors(document)
    npy = paths["/v1/embeddings/images"]["post"]["responses"]["200"]
    npy["content"]["application/x-npy"] = _BINARY
    npy["headers"] = npy["headers"] | {"X-Clipfleet-Errors": _ERRORS}
    # While not ready it answers with what is missing; while stopping, or without a replica, with an error.
    unready = paths["/readyz"]["get"]["responses"]["503"]["content"]["application/json"]
    unready["schema"] = {"anyOf": [{"$ref": _REF + "Health"}, unready["schema"]]}
    if asks_keys:
        document["components"]["securitySchemes"] = _KEYS
        for operation in (operation for operations in paths.values() for operation in operations.values()):
            if "401" in operation["responses"]:
                operation["security"] = [{"apiKey": []}]
    return document


def _add_body(operation: dict[str, Any], content: dict[str, Any]) -> None:
    operation["requestBody"] = {"required": True, "content": content}
    operation.setdefault("parameters", []).append(_DEADLINE)


def _without_the_frameworks_errors(document: dict[str, Any]) -> None:
    """Ours answer 400 with ErrorResponse; 422 stays where it is one of ours."""
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]


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
    answers = dict(operation["responses"])
    good = answers.pop("200")["content"]
    errors = "".join(f"<li>{status}: {escape(answer['description'])}</li>" for status, answer in answers.items())
    return (
        f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
        f"{_json(shown) if shown else ''}<p>Answers:</p>{_json(good)}<p>Errors:</p><ul>{errors}</ul>"
    )


def _json(content: Any) -> str:
    return f"<pre>{escape(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())}</pre>"
