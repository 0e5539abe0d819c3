"""Request bodies: read under a limit, counted against what the ingress may hold, never more than once in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from clipfleet.errors import BodyTooLarge, InvalidRequest, TooManyItems
from clipfleet.settings import LimitSettings
from deployments.admission import Admission

M = TypeVar("M", bound=BaseModel)


class Body:
    """One request's body. The bytes stay counted until `held` is closed."""

    def __init__(self, request: Request, limits: LimitSettings, admission: Admission, held: ExitStack) -> None:
        self._request = request
        self._limits = limits
        self._admission = admission
        self._held = held

    async def read(self) -> bytes:
        """The whole body. Raises BodyTooLarge, Overloaded or InvalidRequest."""
        parts = [part async for part in self._stream()]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_files(self) -> list[bytes]:
        """The parts of a multipart body that have a filename, in order."""
        parser = MultiPartParser(
            self._request.headers,
            self._stream(),
            max_files=self._limits.images_per_request,
            max_fields=self._limits.images_per_request,
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if error.message.startswith("Too many files"):
                limit = self._limits.images_per_request
                raise TooManyItems(
                    f"the request has more than {limit} images, the limit; send them in several requests",
                    limit=limit,
                    param="files",
                ) from None
            raise InvalidRequest(f"the multipart body is malformed: {error.message}") from None
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"the multipart body is malformed: {error}") from None
        try:
            return [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        finally:
            await form.close()

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        if self._request.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("compressed bodies (Content-Encoding) are not accepted")
        declared = self._declared_length()
        if declared is not None:
            self._held.enter_context(self._admission.hold_bytes(declared))
        received = 0
        async for chunk in self._request.stream():
            received += len(chunk)
            if received > self._limits.body_bytes:
                raise self._too_large(received)
            if declared is None and chunk:
                self._held.enter_context(self._admission.hold_bytes(len(chunk)))
            if chunk:
                yield chunk

    def _declared_length(self) -> int | None:
        text = self._request.headers.get("content-length")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit()):
            raise InvalidRequest("Content-Length is no number")
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


def parse_json(data: bytes, kind: type[M]) -> M:
    """Parse and validate JSON. Raises InvalidRequest with the field's name; nothing that was sent is echoed."""
    try:
        content = orjson.loads(data)  # refuses NaN, lone surrogates and nesting without end
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: {error.msg} at byte {error.pos}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid(error.errors(include_input=False, include_url=False, include_context=False)) from None


def invalid(problems: Sequence[Any]) -> InvalidRequest:
    """One error from pydantic's list of problems; the field's name, with the item's place, goes to `param`."""
    first = problems[0]
    place = first["loc"]
    if not place:
        return InvalidRequest("the body must be a JSON object")
    # Where several types are accepted, pydantic reports one problem for each of them.
    same = [problem for problem in problems if problem["loc"][:1] == place[:1]]
    index = next((part for problem in same for part in problem["loc"] if isinstance(part, int)), None)
    param = f"{place[0]}" if index is None else f"{place[0]}[{index}]"
    reason = "has none of the accepted types (see /docs)" if len(same) > 1 else first["msg"]
    return InvalidRequest(f"{param}: {reason}", param=param)
