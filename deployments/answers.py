"""What each route may answer, as /openapi.json shows it: every status, with its body and its headers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from deployments.responses import codes_of
from deployments.schemas import ErrorResponse

# HAProxy's own are among them: 400 for what is no HTTP, 408, and 503 and 504 when no replica answers.
OPEN = (400, 408, 503, 504)
KEYED = (*OPEN, 401, 429)
ITEMS = (*KEYED, 404, 413, 415, 422)

_WHEN = {
    400: "The request makes no sense, or an item in it is no image, text or address that is accepted.",
    401: "The API key is missing or wrong.",
    404: "Another model than the served one.",
    408: "The request came too slowly.",
    413: "The body, the number of items or one image is over a limit.",
    415: "An image of another format than the accepted ones.",
    422: "An image that is empty, corrupt or cannot be fetched.",
    429: "More is in flight than the limits allow, or would be done too late.",
    503: "No replica can answer now.",
    504: "The deadline has passed.",
}

_TEXT = {"type": "string"}
_SECONDS = {"description": "Seconds after which to come back.", "schema": {"type": "integer", "minimum": 1}}
_FINGERPRINT = {
    "X-Clipfleet-Fingerprint": {"description": "What makes vectors comparable; absent at first.", "schema": _TEXT}
}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": _TEXT}},
    429: {"Retry-After": _SECONDS},
    503: {"Retry-After": _SECONDS},
}


def _codes(status: int, *, of_items: bool) -> list[str]:
    return codes_of(status) if status not in (400, 408) or (status == 400 and of_items) else ["invalid_request"]


def answers(
    good: type[BaseModel], statuses: tuple[int, ...], problem: type[BaseModel] = ErrorResponse
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers `good`, or an error with one of `statuses`, worded as `problem`."""
    problems = {
        status: {
            "model": problem,
            "description": f"{_WHEN[status]} Codes: {', '.join(_codes(status, of_items=413 in statuses))}.",
            "headers": _HEADERS.get(status, {}) | _FINGERPRINT,
        }
        for status in sorted(statuses)
    }
    return {200: {"model": good, "headers": _FINGERPRINT}, **problems}
