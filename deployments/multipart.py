"""The files of a multipart body, gathered as it arrives: in memory, never on disk, and a body that was cut refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from clipfleet.errors import InvalidRequest, TooManyItems

_PADDING = 1000  # bytes of spaces behind a boundary, beside those that came in one piece with it
_LOOKS = 4  # times the limit of files, which is that of other fields too


async def read_files(content_type: str, stream: AsyncIterator[bytes], most: int) -> list[bytes]:
    """The parts that have a filename, in order, at most `most`. Raises InvalidRequest or TooManyItems."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("the multipart body is malformed: its Content-Type names no boundary")
    parts, delimiter = _Parts(most), b"\r\n--" + boundary
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        padding = looks = 0
        async for chunk in stream:
            was_padding = parser.state == MultipartState.BOUNDARY_PADDING
            parser.write(chunk)
            # The parser takes each byte between a boundary and its line's end for a step of Python, without a limit.
            still = was_padding and parser.state == MultipartState.BOUNDARY_PADDING
            padding = padding + len(chunk) if still else 0
            if padding > _PADDING:
                raise InvalidRequest("the multipart body is malformed: a boundary's line does not end")
            # What looks like a boundary and is none, in a file, costs it steps too.
            looks += chunk.count(delimiter)
            if looks > _LOOKS * most:
                raise InvalidRequest("the multipart body is malformed: it has more boundaries than parts are allowed")
    except FormParserError as error:
        raise InvalidRequest(f"the multipart body is malformed: {error}") from None
    if not parts.ended:
        raise InvalidRequest("the multipart body ends before its last boundary; a part of it is missing")
    return parts.files


class _Parts:
    def __init__(self, most: int) -> None:
        self.files: list[bytes] = []
        self.ended = False
        self._most = most
        self._fields = 0
        self._header = self._value = b""
        self._named = False  # whether this part has a filename
        self._pieces: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._named, self._pieces = False, []

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            # `filename*` too, which RFC 7578 forbids and some clients send.
            options = parse_options_header(self._value.decode("latin-1"))[1]
            self._named = b"filename" in options or b"filename*=" in self._value.lower()
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._named:
            self._pieces.append(data[start:end])

    def _end(self) -> None:
        if self._named:
            if len(self.files) == self._most:
                raise TooManyItems(
                    f"the request has more than {self._most} images, the limit; send them in several requests",
                    limit=self._most,
                    param="files",
                )
            self.files.append(self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces))
        else:
            self._fields += 1
            if self._fields > self._most:
                raise InvalidRequest(f"the multipart body has more than {self._most} fields beside its files")

    def _finish(self) -> None:
        self.ended = True
