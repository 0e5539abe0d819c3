"""Every error that clipfleet raises on purpose.

    ClipfleetError
    ├── InputError                  what was sent is at fault
    │   ├── InvalidRequest
    │   │   ├── InvalidBase64
    │   │   ├── EmptyInput
    │   │   ├── UnsupportedDimensions
    │   │   ├── UnsupportedScheme
    │   │   ├── ImageUrlsDisabled
    │   │   └── ImageUrlForbidden
    │   ├── InvalidApiKey
    │   ├── ModelNotFound
    │   ├── RouteNotFound
    │   ├── BodyTooLarge
    │   ├── TooManyItems
    │   └── ImageError              one image is at fault
    │       ├── ImageTooManyBytes
    │       ├── ImageTooManyPixels
    │       ├── ImageFormatUnsupported
    │       ├── ImageEmpty
    │       ├── ImageCorrupt
    │       ├── ImageCrashedDecoder
    │       ├── ImageNotFound       (a FileNotFoundError too)
    │       ├── ImageUnreadable     (an OSError too)
    │       └── ImageNotFetched
    ├── ServiceError                the service cannot answer now
    │   ├── Overloaded
    │   ├── Unavailable
    │   └── DeadlineExceeded
    └── SetupError                  what was configured is at fault
        ├── SettingsError
        ├── CheckpointError
        │   ├── CheckpointNotFound
        │   └── CheckpointUnsupported
        ├── DeviceUnavailable
        ├── FingerprintMismatch
        ├── JobError
        └── Closed

Each class has a `code` of its own, the word that crosses the wire and stands in the job's `error` column.
Instances survive pickling with their data, because they cross processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class ClipfleetError(Exception):
    """Root of the tree.

    `code` names the kind of error, `index` is the item's place in the caller's input (None where the
    error concerns no single item), `data` holds the numbers and names of the message.
    """

    code: ClassVar[str] = "clipfleet_error"

    def __init__(self, message: str, *, index: int | None = None, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.index = index
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.index, self.data)

    def at(self, index: int) -> ClipfleetError:
        """The same error, for the item at `index`."""
        return _rebuild(type(self), self.message, index, self.data)


def kinds(root: type[ClipfleetError] = ClipfleetError) -> Iterator[type[ClipfleetError]]:
    """A class of this module and all below it."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == __name__:  # not the service's own, whose codes are those of their parents
            yield from kinds(child)


def by_code(code: str) -> type[ClipfleetError] | None:
    """The class of a code, the most particular one where a class shares its parent's; None where no class has it."""
    return {kind.code: kind for kind in kinds()}.get(code)


def _rebuild(kind: type[ClipfleetError], message: str, index: int | None, data: dict[str, Any]) -> ClipfleetError:
    return kind(message, index=index, **data)


class InputError(ClipfleetError):
    """What was sent is at fault."""

    code = "invalid_request"


class InvalidRequest(InputError):
    """The request cannot be understood: malformed JSON, wrong types, unknown fields' values."""


class InvalidBase64(InvalidRequest):
    """A bare base64 string or the payload of a data URI does not decode."""

    code = "invalid_base64"


class EmptyInput(InvalidRequest):
    """A list without items, or a text without characters."""

    code = "empty_input"


class UnsupportedDimensions(InvalidRequest):
    """`dimensions` differs from the checkpoint's own dimension."""

    code = "unsupported_dimensions"


class UnsupportedScheme(InvalidRequest):
    """An image address whose scheme is neither data, http nor https."""

    code = "unsupported_scheme"


class ImageUrlsDisabled(InvalidRequest):
    """An http(s) address where fetching images is switched off."""

    code = "image_urls_disabled"


class ImageUrlForbidden(InvalidRequest):
    """An address that is not fetched from, such as one inside a private network."""

    code = "image_url_forbidden"


class InvalidApiKey(InputError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"


class ModelNotFound(InputError):
    """The request names a model that this service does not serve."""

    code = "model_not_found"


class RouteNotFound(InputError):
    """No such path, or not with this method."""

    code = "route_not_found"


class BodyTooLarge(InputError):
    """The request body is over the limit."""

    code = "body_too_large"


class TooManyItems(InputError):
    """More images or texts than one request may hold."""

    code = "too_many_items"


class ImageError(InputError):
    """One image is at fault; its neighbours are not."""

    code = "image_corrupt"


class ImageTooManyBytes(ImageError):
    """The encoded image is over the limit in bytes."""

    code = "image_too_many_bytes"


class ImageTooManyPixels(ImageError):
    """The image, or an intermediate of its resizing, is over the limit in pixels."""

    code = "image_too_many_pixels"


class ImageFormatUnsupported(ImageError):
    """The first bytes are no signature of an accepted format."""

    code = "image_format_unsupported"


class ImageEmpty(ImageError):
    """Zero bytes."""

    code = "image_empty"


class ImageCorrupt(ImageError):
    """The signature is known, but the rest does not decode."""

    code = "image_corrupt"


class ImageCrashedDecoder(ImageError):
    """The process that decoded the image died or did not end, twice."""

    code = "image_crashed_decoder"


class ImageNotFound(ImageError, FileNotFoundError):
    """No file at this path."""

    code = "file_not_found"


class ImageUnreadable(ImageError, OSError):
    """The path is no regular file, or reading it failed or took too long."""

    code = "file_unreadable"


class ImageNotFetched(ImageError):
    """An image's address that does not give an image."""

    code = "image_not_fetched"


class ServiceError(ClipfleetError):
    """The service cannot answer now; `data["retry_after"]` (seconds) says when to come back."""

    code = "unavailable"


class Overloaded(ServiceError):
    """Taking this request would pass the limit of items or bytes in flight."""

    code = "overloaded"


class Unavailable(ServiceError):
    """No replica can answer."""


class DeadlineExceeded(ServiceError):
    """The request's deadline has passed."""

    code = "deadline_exceeded"


class SetupError(ClipfleetError):
    """What was configured is at fault."""

    code = "setup_error"


class SettingsError(SetupError):
    """Settings that are unknown, out of range or contradict each other."""

    code = "invalid_settings"


class CheckpointError(SetupError):
    """The checkpoint cannot be used."""

    code = "checkpoint_error"


class CheckpointNotFound(CheckpointError):
    """The checkpoint is neither a folder, nor in the hub's cache, nor can it be downloaded."""

    code = "checkpoint_not_found"


class CheckpointUnsupported(CheckpointError):
    """The checkpoint's model_type, files or settings are not supported."""

    code = "checkpoint_unsupported"


class DeviceUnavailable(SetupError):
    """The device that was asked for is not there."""

    code = "device_unavailable"


class FingerprintMismatch(SetupError):
    """Two sets of vectors that cannot be compared were about to be mixed."""

    code = "fingerprint_mismatch"


class JobError(SetupError):
    """An offline job cannot start or go on."""

    code = "job_error"


class Closed(SetupError):
    """The embedder was closed and holds no model any more."""

    code = "closed"
