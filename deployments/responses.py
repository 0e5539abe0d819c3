"""From outcomes and errors to HTTP: vectors as JSON or .npy, the one table of statuses, and OpenAI's error body."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import orjson
from ray.serve.metrics import Counter
from starlette.responses import Response

from clipfleet import errors
from clipfleet.errors import ClipfleetError
from clipfleet.vectors import to_base64, to_npy
from deployments.encoder import EncodedText
from deployments.pipeline import Outcome
from deployments.schemas import Options

NPY = "application/x-npy"
ERRORS_HEADER = "X-Clipfleet-Errors"
FINGERPRINT_HEADER = "X-Clipfleet-Fingerprint"

# Looked up along a class's bases, so a leaf without a line has its parent's status.
STATUS: dict[type[ClipfleetError], int] = {
    errors.InputError: 400,
    errors.InvalidApiKey: 401,
    errors.ModelNotFound: 404,
    errors.RouteNotFound: 404,
    errors.BodyTooLarge: 413,
    errors.TooManyItems: 413,
    errors.ImageError: 422,
    errors.ImageTooManyBytes: 413,
    errors.ImageTooManyPixels: 413,
    errors.ImageFormatUnsupported: 415,
    errors.Overloaded: 429,
    errors.ServiceError: 503,
    errors.DeadlineExceeded: 504,
    ClipfleetError: 503,
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def status_of(error: ClipfleetError) -> int:
    """The HTTP status of an error."""
    return _status(type(error))


def _status(kind: type[ClipfleetError]) -> int:
    return next(STATUS[base] for base in kind.__mro__ if base in STATUS)


def codes_of(status: int) -> list[str]:
    """The codes that an answer of this status may have. A service opens no files, so it has none of their errors."""
    found = (*errors.kinds(errors.InputError), *errors.kinds(errors.ServiceError))
    return list(dict.fromkeys(kind.code for kind in found if _status(kind) == status and not issubclass(kind, OSError)))


@cache
def _errors_total() -> Counter:
    tags: Any = ("tower", "code")  # Ray's annotation says a tuple of one
    return Counter("clipfleet_errors_total", "Errors in answers, by code.", tag_keys=tags)


_OF_IMAGES = (
    errors.ImageError, errors.InvalidBase64, errors.UnsupportedScheme, errors.ImageUrlsDisabled, errors.ImageUrlForbidden,
)  # fmt: skip


def count_error(error: ClipfleetError) -> None:
    """Add an error that stands in an answer to the metrics."""
    tower = "image" if isinstance(error, _OF_IMAGES) else "none"
    _errors_total().inc(tags={"tower": tower, "code": error.code})


def error_body(error: ClipfleetError, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error body."""
    status = status_of(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "code": error.code, "param": param}}


def error_response(error: ClipfleetError, param: str | None = None) -> Response:
    """The whole answer to a request that failed, which is counted."""
    count_error(error)
    status = status_of(error)
    response = json_response(error_body(error, param), status)
    if status in (429, 503):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.data.get("retry_after", 1))))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def json_response(content: object, status: int = 200, *, fingerprint: str | None = None) -> Response:
    """JSON by orjson, which writes numpy vectors from their buffers; those were made by the checkpoint of that fingerprint.

    The gate's would be the fingerprint of now, which may have changed while they were computed.
    """
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {FINGERPRINT_HEADER: fingerprint} if fingerprint else None
    return Response(body, status, headers, media_type="application/json")


def vector(outcome: Outcome) -> np.ndarray:
    """A good outcome's vector (d,)."""
    assert not isinstance(outcome, ClipfleetError)
    return outcome.vector if isinstance(outcome, EncodedText) else outcome


def entry(number: int, outcome: Outcome, options: Options) -> dict[str, Any]:
    """One item of OpenAI's `data`: its vector, or its error, which is counted."""
    entry: dict[str, Any] = {"object": "embedding", "index": number}
    if isinstance(outcome, ClipfleetError):
        count_error(outcome)
        error = error_body(outcome)["error"]
        return entry | {"embedding": None, "error": {"code": error["code"], "message": error["message"]}}
    found = vector(outcome)
    entry["embedding"] = to_base64(found, options.dtype) if options.encoding_format == "base64" else found
    if isinstance(outcome, EncodedText) and outcome.truncated:
        entry["truncated"] = True
    return entry


def npy_response(outcomes: Sequence[Outcome], options: Options, model: Mapping[str, Any]) -> Response:
    """One .npy (n, d), with NaN rows for the bad items, which a header lists."""
    bad = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, ClipfleetError)}
    missing = np.full(model["dimension"], np.nan, np.float32)
    rows = [missing if i in bad else vector(outcome) for i, outcome in enumerate(outcomes)]
    headers = {FINGERPRINT_HEADER: model["fingerprint"]}
    response = Response(to_npy(np.stack(rows), options.dtype), media_type=NPY, headers=headers)
    if bad:
        for error in bad.values():
            count_error(error)
        listed = [{"index": i, "code": error.code} for i, error in bad.items()]
        response.headers[ERRORS_HEADER] = orjson.dumps(listed).decode()
    return response
