"""From what a request holds to what the deployments take: image bytes or text, or the error of that one item."""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

from clipfleet.errors import (
    EmptyInput,
    ImageEmpty,
    ImageTooManyBytes,
    ImageUrlsDisabled,
    InputError,
    InvalidBase64,
    InvalidRequest,
    TooManyItems,
    UnsupportedScheme,
)
from clipfleet.settings import LimitSettings
from deployments.schemas import ImageItem, Item, Modality, TextItem


@dataclass(frozen=True)
class ImageUrl:
    """An image that is still to be fetched."""

    address: str


Input = bytes | str | InputError  # an image, a text, or why it is neither

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_WHITESPACE = b" \t\r\n\v\f"
_STANDARD = bytes.maketrans(b"-_", b"+/")  # base64 for addresses to the usual one


def read_items(
    items: Sequence[Item], modality: Modality, limits: LimitSettings, param: str, *, urls: bool
) -> list[Input | ImageUrl]:
    """Turn the items of the request's field `param` into inputs, in order; an item's own error takes its place.

    `urls` says whether images may be addresses. Raises EmptyInput or TooManyItems.
    """
    kinds = [
        modality if isinstance(item, str) else "image" if isinstance(item, ImageItem) else "text" for item in items
    ]
    check_counts(kinds.count("image"), kinds.count("text"), limits, param)
    return [_read_item(item, kind, limits, urls) for item, kind in zip(items, kinds, strict=True)]


def check_counts(images: int, texts: int, limits: LimitSettings, param: str) -> None:
    """Raise EmptyInput or TooManyItems."""
    if images + texts == 0:
        raise EmptyInput(f"{param} is empty; send at least one item", param=param)
    for count, limit, what in (
        (images, limits.images_per_request, "images"),
        (texts, limits.texts_per_request, "texts"),
    ):
        if count > limit:
            raise TooManyItems(
                f"the request has {count:,} {what}; the limit is {limit:,}. Send them in several requests",
                count=count,
                limit=limit,
                param=param,
            )


def _read_item(item: Item, kind: str, limits: LimitSettings, urls: bool) -> Input | ImageUrl:
    try:
        if kind == "image":
            return _read_image(item.image if isinstance(item, ImageItem) else str(item), limits, urls)
        return _read_text(item.text if isinstance(item, TextItem) else str(item), limits)
    except InputError as error:
        return error


def _read_text(text: str, limits: LimitSettings) -> str:
    if not text:
        raise EmptyInput("the text is empty")
    if len(text) > limits.text_characters:
        raise InvalidRequest(f"the text has {len(text):,} characters; the limit is {limits.text_characters:,}")
    return text


def _read_image(source: str, limits: LimitSettings, urls: bool) -> bytes | ImageUrl:
    scheme = _SCHEME.match(source[:64])
    if scheme is None:
        return _from_base64(source, limits)
    name = scheme[1].lower()
    if name in ("http", "https"):
        if urls:
            return ImageUrl(source)
        raise ImageUrlsDisabled("fetching images by address is switched off; send the image itself as a data URI")
    if name != "data":
        raise UnsupportedScheme(f"scheme {name!r} is not supported; send a data URI or bare base64")
    head, comma, payload = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidBase64("a data URI must have the form data:image/png;base64,...")
    return _from_base64(payload, limits)


def _check_length(letters: float, limits: LimitSettings) -> None:
    if letters * 3 / 4 > limits.image_bytes + 3:
        raise ImageTooManyBytes(f"the image has over {limits.image_bytes:,} bytes, which is the limit")


def _from_base64(text: str, limits: LimitSettings) -> bytes:
    _check_length(len(text) * 0.9, limits)  # before memory is spent on it; line breaks are 3% of wrapped base64
    compact = text.encode("ascii", "replace").translate(_STANDARD, _WHITESPACE)
    _check_length(len(compact), limits)
    if not compact:
        raise ImageEmpty("the image has 0 bytes")
    try:
        return binascii.a2b_base64(compact + b"=" * (-len(compact) % 4), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidBase64(f"the image is not valid base64: {error}") from None
