"""Request bodies: read under a limit, counted against what the ingress may hold, never more than once in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from clipfleet.errors import BodyTooLarge, InvalidRequest, TooManyItems
from clipfleet.settings import LimitSettings
from deployments.admission import Admission
from deployments.multipart import read_files
from deployments.schemas import ITEM_TYPES

M = TypeVar("M", bound=BaseModel)


class Body:
    """One request's body. The bytes stay counted until `held` is closed."""

    def __init__(
        self, request: Request, limits: LimitSettings, admission: Admission, held: ExitStack, key: str | None
    ) -> None:
        self._request = request
        self._key = key  # the name of the API key that it came with
        self._limits = limits
        self._admission = admission
        self._held = held

    async def read(self) -> bytes:
        """The whole body. Raises BodyTooLarge, Overloaded or InvalidRequest."""
        parts = [part async for part in self._stream()]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_files(self) -> list[bytes]:
        """The parts of a multipart body that have a filename, in order."""
        kind = self._request.headers["content-type"]
        return await read_files(kind, self._stream(), self._limits.images_per_request)

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        if self._request.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("compressed bodies (Content-Encoding) are not accepted")
        declared = self._declared_length()
        if declared is not None:
            self._admission.check_bytes(declared, key=self._key)  # before anything of it is read
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > self._limits.body_bytes:
                raise self._too_large(received)
            if chunk:
                # As it arrives: what a client has only announced must not keep others out.
                self._held.enter_context(self._admission.hold_bytes(len(chunk), received - len(chunk), self._key))
                yield chunk

    def _declared_length(self) -> int | None:
        text = self._request.headers.get("content-length")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise InvalidRequest("Content-Length is no number of bytes")
        if int(text) > self._limits.body_bytes:
            raise self._too_large(int(text))
        return int(text)

    def _too_large(self, size: int) -> BodyTooLarge:
        limit = self._limits.body_bytes
        return BodyTooLarge(
            f"the body has {size:,} bytes or more; the limit is {limit:,}. Send fewer items a request",
            bytes=size,
            limit=limit,
        )


# Whatever is neither, and then a JSON string, whose closing quote may be missing, or a sign of structure (group 1); no
# backtracking and no second start, so any body takes one pass.
_TOKEN = re.compile(rb'[^",\[{]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|([,\[{])|\Z)', re.DOTALL)
_STRUCTURE = (b",", b"[", b"{")

_NAME = re.compile(r"[A-Za-z_][\w-]{0,39}", re.ASCII)  # of a field, as it may stand in a message


def check_structure(data: bytes, most: int) -> None:
    """Refuse JSON of more than `most` values before it is parsed: 64 MiB of `"a",` would become gigabytes of objects.

    Raises TooManyItems.
    """
    if sum(map(data.count, _STRUCTURE)) <= most:
        return
    # Signs of structure but those in texts and data URIs. What is JSON has two strings for one of them at most; the rest of
    # what has more is not even looked at.
    tokens = list(islice(_TOKEN.finditer(data), 3 * most + 3))
    if len(tokens) == 3 * most + 3 or sum(token.lastindex is not None for token in tokens) > most:
        raise TooManyItems(
            f"the body holds more than {most:,} JSON values, which is more than the limits on items allow; "
            "send them in several requests",
            limit=most,
        )


def parse_json(data: bytes, kind: type[M], limits: LimitSettings) -> M:
    """Parse and validate JSON. Raises TooManyItems or InvalidRequest, whose message has a field's name of it at most."""
    # An item is at most an object of one field: a comma and a brace. The rest is for other fields.
    check_structure(data, 2 * (limits.images_per_request + limits.texts_per_request) + 1000)
    try:
        content = orjson.loads(data)  # refuses NaN, lone surrogates and nesting without end
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: {error.msg} at byte {error.pos}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None


_ITEM = 'an item is a string, {"text": "..."} or {"image": "..."}'
_NO_ITEM = (
    f"has none of the accepted types; {_ITEM}. Token ids are not taken: LangChain's OpenAIEmbeddings sends texts with "
    "check_embedding_ctx_length=False"
)

_NO_QUERY = (
    'is a text, {"text": "..."}, {"image": "..."}, {"id": "..."}, or a list of up to 16 such objects, each with a `weight` '
    "from -100 to 100 if you like"
)


def invalid(problems: Sequence[Any]) -> InvalidRequest:
    """One error from pydantic's list of problems; the field's name, with the item's place, goes to `param`."""
    first = problems[0]
    place = first["loc"]
    if not place:
        return InvalidRequest("the body must be a JSON object")
    if len(place) == 1 and first["type"] == "extra_forbidden":
        name = str(place[0]) if _NAME.fullmatch(str(place[0])) else None
        return InvalidRequest(f"there is no field {name!r}" if name else "there is an unknown field", param=name)
    # Where several types are accepted, pydantic reports one problem for each of them.
    same = [problem for problem in problems if problem["loc"][:1] == place[:1]]
    index = next((part for problem in same for part in problem["loc"] if isinstance(part, int)), None)
    param = f"{place[0]}" if index is None else f"{place[0]}[{index}]"
    if any("WeightedItem" in str(part) for problem in same for part in problem["loc"]):
        return InvalidRequest(f"{param}: {_NO_QUERY}", param=param)
    reason = _misnamed(same) or (_NO_ITEM if len(same) > 1 else first["msg"])
    return InvalidRequest(f"{param}: {reason}", param=param)


def _misnamed(problems: Sequence[Any]) -> str | None:
    """What is wrong with the names of an item's fields; None where something else is wrong."""
    unknown: dict[str, set[str]] = {}  # by the type that does not have them
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            unknown.setdefault(str(problem["loc"][-2]), set()).add(str(problem["loc"][-1]))
    if len(unknown) < len(ITEM_TYPES):
        return None
    nowhere = set.intersection(*unknown.values())
    shown = next((name for name in sorted(nowhere) if _NAME.fullmatch(name)), None)
    named = (
        f"has the unknown field {shown!r}"
        if shown
        else "has an unknown field"
        if nowhere
        else "has a text and an image"
    )
    return f"{named}; {_ITEM}, with no other field"
