"""How large a picture of the AV1 bitstream is, from its headers (AV1 Bitstream & Decoding Process Specification, 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_FRAMES = 16  # of a picture, hidden ones included: each costs as much as the picture
_SEQUENCE_HEADER = 1
_FRAME_HEADERS = (3, 6, 7)  # alone, with the frame, and repeated
_KEY_FRAME, _SWITCH_FRAME = 0, 3
_SELECT = 2


class Damaged(Exception):
    """What is there cannot be decoded."""


class Units:
    """How many parts of bitstreams may still be read: each is a step of Python, also those that decoders pass over."""

    def __init__(self, left: int) -> None:
        self.left = left


class Frames(NamedTuple):
    """What a picture decodes to: the largest frame's pixels, how many frames, and whether values have more than 8 bits."""

    pixels: int
    number: int
    deep: bool


def frames_of(picture: memoryview, units: Units) -> Frames:
    """Read the headers in the bytes of a picture. Raises Damaged."""
    sequence: _Sequence | None = None
    most = frames = position = 0
    deep = False
    while position < len(picture):
        kind, start, end = _unit(picture, position)
        units.left -= 1
        if kind == _SEQUENCE_HEADER:
            sequence = _sequence(_Bits(picture[start:end]))
            most, deep = max(most, sequence.width * sequence.height), deep or sequence.deep
        elif kind in _FRAME_HEADERS and sequence is not None:
            frames += 1
            if not sequence.still and _has_own_size(_Bits(picture[start:end]), sequence):
                most = max(most, 1 << (sequence.width_bits + sequence.height_bits))
        if units.left < 0 or frames > _FRAMES:
            raise Damaged(f"a picture has more than {_FRAMES} frames, or all of them have too many parts")
        position = end
    if sequence is None:
        raise Damaged("a picture has no sequence header")
    return Frames(most, max(frames, 1), deep)


def _unit(data: memoryview, position: int) -> tuple[int, int, int]:
    """The kind of the unit at `position`, and where its payload starts and ends."""
    head = data[position]
    start = position + (2 if head & 4 else 1)
    if not head & 2:  # no size: up to the end
        return head >> 3 & 15, start, len(data)
    size = 0
    for number in range(8):
        if start >= len(data):
            raise Damaged("a part is cut off")
        byte = data[start]
        start += 1
        size |= (byte & 127) << 7 * number
        if byte < 128:
            break
    if start + size > len(data):
        raise Damaged("a part is cut off")
    return head >> 3 & 15, start, start + size


class _Bits:
    _MOST = 1024  # bytes: headers are read up to their sizes only

    def __init__(self, data: memoryview) -> None:
        self._left = 8 * min(len(data), self._MOST)
        self._value = int.from_bytes(data[: self._MOST], "big")

    def take(self, count: int = 1) -> int:
        self._left -= count
        if self._left < 0:
            raise Damaged("a header is cut off")
        return self._value >> self._left & ((1 << count) - 1)

    def pass_uvlc(self) -> None:
        zeros = 0
        while not self.take():
            zeros += 1
        if zeros < 32:
            self.take(zeros)


@dataclass
class _Sequence:
    still: bool  # with a reduced header, so that every frame has the sequence's own size
    width: int = 0
    height: int = 0
    width_bits: int = 0
    height_bits: int = 0
    time_bits: int = 0  # of what each shown frame says about its time
    id_bits: int = 0
    screen_tools: int = _SELECT
    integer_vectors: int = _SELECT
    deep: bool = False  # values have more than 8 bits


def _sequence(bits: _Bits) -> _Sequence:
    bits.take(4)  # profile, still picture
    sequence = _Sequence(still=bool(bits.take()))
    if sequence.still:
        bits.take(5)  # level
    else:
        _pass_operating_points(bits, sequence)
    sequence.width_bits, sequence.height_bits = bits.take(4) + 1, bits.take(4) + 1
    sequence.width, sequence.height = bits.take(sequence.width_bits) + 1, bits.take(sequence.height_bits) + 1
    if sequence.still:
        bits.take(3)  # block size, filter intra, intra edges
    else:
        _read_tools(bits, sequence)
    bits.take(3)  # super-resolution, directional enhancement, restoration
    sequence.deep = bool(bits.take())
    return sequence


def _pass_operating_points(bits: _Bits, sequence: _Sequence) -> None:
    delay_bits = 0
    if bits.take():  # timing
        bits.take(64)
        if equal_intervals := bits.take():
            bits.pass_uvlc()
        if bits.take():  # decoder model
            delay_bits = bits.take(5) + 1
            bits.take(32 + 5)
            time_bits = bits.take(5) + 1
            sequence.time_bits = 0 if equal_intervals else time_bits
    has_display_delay = bits.take()
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:  # level
            bits.take()
        if delay_bits and bits.take():
            bits.take(2 * delay_bits + 1)
        if has_display_delay and bits.take():
            bits.take(4)


def _read_tools(bits: _Bits, sequence: _Sequence) -> None:
    if bits.take():  # frames have numbers
        delta = bits.take(4) + 2
        sequence.id_bits = delta + bits.take(3) + 1
    bits.take(7)  # block size, filter intra, intra edges, interintra, masks, warps, dual filter
    ordered = bits.take()
    if ordered:
        bits.take(2)
    sequence.screen_tools = _SELECT if bits.take() else bits.take()
    if sequence.screen_tools:
        sequence.integer_vectors = _SELECT if bits.take() else bits.take()
    if ordered:
        bits.take(3)  # bits of a hint


def _has_own_size(bits: _Bits, sequence: _Sequence) -> bool:
    """Whether a frame may be larger than its sequence says: decoders need not compare."""
    if bits.take():  # shows an earlier one
        return False
    kind, shown = bits.take(2), bits.take()
    if shown:
        bits.take(sequence.time_bits)
    else:
        bits.take()  # showable
    if not (kind == _SWITCH_FRAME or (kind == _KEY_FRAME and shown)):
        bits.take()  # error resilient
    bits.take()  # update of probabilities
    screen_tools = bits.take() if sequence.screen_tools == _SELECT else sequence.screen_tools
    if screen_tools and sequence.integer_vectors == _SELECT:
        bits.take()
    bits.take(sequence.id_bits)
    return kind == _SWITCH_FRAME or bool(bits.take())
