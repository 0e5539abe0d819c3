"""Typed settings of the service, and the only reader of the environment."""

from __future__ import annotations

import difflib
import importlib.util
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clipfleet.engines import Engine, Precision, check_engine
from clipfleet.errors import SettingsError
from clipfleet.keys import fits_a_header, hashed, read_keys
from clipfleet.qdrant import place_of

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

Count = Annotated[int, Field(ge=1)]
LogFormat = Literal["text", "json"]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values do not change.

    What stands below a field describes it in docs/settings.md, so links are relative to that page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class LimitSettings(Settings):
    """What one request, one image and the whole ingress may cost."""

    body_bytes: Count = 64 * 1024 * 1024
    """Bytes of a request's body. The images that it names by address have the same limit, together."""
    images_per_request: Count = 64
    """Images of one request."""
    texts_per_request: Count = 2048
    """Texts of one request."""
    text_characters: Count = 100_000
    """Characters of one text."""
    image_bytes: Count = 20 * 1024 * 1024
    """Bytes of one image, sent or fetched."""
    image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000  # Pillow's own limit stands behind ours
    """Pixels of one image, and of what resizing makes of it on its way."""
    image_formats: tuple[str, ...] = IMAGE_FORMATS
    """Formats that are accepted, some of the default ones. An animation gives its first frame."""
    deadline_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds from a request's arrival to its answer. A replica that is to go has 5 more to answer what it holds, unless the
    deployment's `graceful_shutdown_timeout_s` says otherwise. A service manager's patience at a stop must be longer, too.
    HAProxy waits 300 for an answer, 120 from an upgrade on."""
    forward_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds of one forward pass. One that takes longer hangs, so its encoder's process is ended and replaced."""
    inflight_items: Count = 4096
    """Images that one ingress replica holds at once, and as many texts. Beyond that it answers 429."""
    inflight_items_per_key: Count | None = None
    """Items of one API key that an ingress replica holds at once, so that one tenant cannot starve the others; a key then
    has half of `inflight_bytes` too. With null a key may have all."""
    inflight_bytes: Count = 512 * 1024 * 1024
    """Bytes of requests that one ingress replica holds at once. Beyond that it answers 429."""
    decoding_bytes: Count = 1024 * 1024 * 1024
    """Decoded bytes that one decoder replica holds at once. Each of its threads, four at most, keeps up to 64 MiB besides, to
    use them again."""

    @field_validator("image_formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(formats) - set(IMAGE_FORMATS)
        if unknown or not formats:
            raise ValueError(f"image_formats must be some of {', '.join(IMAGE_FORMATS)}")
        return formats


class CacheSettings(Settings):
    """What each ingress replica remembers of items that come again."""

    text_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    """Bytes of memory for vectors of texts, about 25,000 of them at 512 dimensions. 0 switches it off."""
    image_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of memory for vectors of images. 0 switches it off."""


class UrlSettings(Settings):
    """Images by their http(s) address."""

    enabled: bool = False
    """Whether images are fetched at all."""
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    """Ports that are fetched from."""
    redirects: Annotated[int, Field(ge=0, le=10)] = 3
    """Redirects that are followed for one image."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for one image."""
    at_once: Count = 8
    """Images that an ingress replica fetches at once, half of them for one API key. So many times `limits.image_bytes` is
    what it may hold of images that still arrive."""
    allowed_networks: tuple[str, ...] = ()
    """Networks beside the internet's, such as `10.1.0.0/16` of your own image store."""

    @field_validator("allowed_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)  # a ValueError that names it
        return networks


class SearchSettings(Settings):
    """The Qdrant collection that `/v1/search` searches."""

    qdrant: str
    """A server's URL, or a folder, which one ingress replica opens."""
    collection: str = "images"
    """The collection's name."""
    qdrant_api_key: Annotated[str | None, Field(repr=False)] = None
    """The server's key. With null it is the variable `QDRANT_API_KEY`, if that is set, which keeps it out of Serve's log."""
    templates: Annotated[tuple[str, ...], Field(min_length=1, max_length=100)] = ("{}",)
    """A text is searched for by the mean of these, such as `["{}", "a photo of a {}"]`, with the text for `{}`."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, for the text")
        return templates


class ServiceSettings(Settings):
    """The `args` of the application: what is served, on what, within which limits."""

    model: str = "openai/clip-vit-base-patch32"
    """`tiny`, a folder, a hub id, or `id@revision`."""
    served_model_name: str | None = None
    """The id in answers. With null it is `model`, of a folder its last path component."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes GPUs where the cluster has some; `cuda` insists."""
    precision: Precision = "float32"
    """[What each costs](vectors.md#precision). `int8` is for CPUs (extra `openvino`), so that `device: auto` means `cpu`."""
    engine: Engine = "auto"
    """`openvino` is for CPUs (extra `openvino`). `auto` takes it there where it is installed, otherwise `torch`."""
    gpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """GPUs that an encoder reserves, a share of one or a whole number. There are at least two encoders (images, texts), so
    one GPU needs 0.5 or less."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that an encoder reserves."""
    threads_per_replica: Count | None = None
    """Threads that an encoder computes with. With null they are `cpus_per_replica`, rounded."""
    exif_orientation: bool = True
    """Whether pictures are turned as their EXIF says."""
    reduced_jpeg: bool = False
    """Whether JPEGs whose shorter side is at least four times the checkpoint's size (896 px at 224) are decoded at a fraction
    of it: sooner, less exact ([how much](vectors.md#precision))."""
    limits: LimitSettings = LimitSettings()
    """What requests may cost."""
    cache: CacheSettings = CacheSettings()
    """Vectors that are remembered."""
    image_urls: UrlSettings = UrlSettings()
    """Images by address."""
    search: SearchSettings | None = None
    """The collection that `/v1/search` searches; null for none."""
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Keys of which clients must send one; the variable `CLIPFLEET_API_KEYS` (comma-separated) adds to them. Without any, and
    without a file of them, the service asks for none. Serve writes arguments into
    its log: `clipfleet serve` gives it hashes of them, `serve run` and `serve deploy` what the file has. There use
    `api_keys_file`, or `sha256:` and a key's SHA-256 in hex instead of the key."""
    api_keys_file: str | None = None
    """A file of [named keys](configuration.md#args). With null it is the variable `CLIPFLEET_API_KEYS_FILE`, if that is set."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the service, such as `["https://shop.example"]`; `["*"]` for all."""
    log_format: LogFormat = "text"
    """Of the replicas' logs, where Ray keeps them; `json` is one object a line. `X-Request-Id` is part of either."""
    page: bool = True
    """Whether there is the page at `/` ([what is on it](search.md#the-page))."""

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(fits_a_header, keys)):
            raise ValueError("a key must be printable ASCII without spaces at its ends, to fit a header")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """As browsers write them: in lower case, without a port that goes without saying."""
        found = [
            re.sub(r"^(http(?=:.*:80$)|https(?=:.*:443$))(.*):\d+$", r"\1\2", origin.lower()) for origin in origins
        ]
        for origin in found:
            if origin != "*" and not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:\d+)?", origin):
                raise ValueError(f"{origin!r} is no origin; give one such as https://shop.example, or '*' for all")
        return tuple(found)

    @field_validator("gpus_per_replica")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("gpus_per_replica must be a share of one GPU or a whole number")
        return gpus

    @model_validator(mode="after")
    def _engine_can(self) -> ServiceSettings:
        try:
            check_engine(self.engine, self.device, self.precision)
        except SettingsError as error:
            raise ValueError(error.message) from None
        return self

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        kind, _, index = device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise ValueError("device must be auto, cpu, cuda or cuda:N")
        return device


class BatchSettings(Settings):
    """The `user_config` of an encoder, which may change while it runs."""

    max_batch_size: Count = 32
    """Items in one forward pass."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Seconds that a batch which is not full waits for company while the model is idle."""


def parse(kind: type[BaseModel], values: dict[str, Any] | None, where: str) -> Any:
    """Validate settings, or raise a SettingsError with one line a problem."""
    try:
        return kind.model_validate(values or {})
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem, kind, where) for problem in error.errors())) from None


def meant(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or nothing where no known name is like it."""
    return "".join(f"did you mean {match}?" for match in difflib.get_close_matches(name, list(known), 1))


def _section(kind: type[BaseModel], names: Sequence[Any]) -> type[BaseModel]:
    """The type of the settings below these names."""
    for name in names:
        annotation = kind.model_fields[name].annotation
        types = (found for found in (annotation, *get_args(annotation)) if isinstance(found, type))
        kind = next(found for found in types if issubclass(found, BaseModel))
    return kind


def _explain(problem: Any, kind: type[BaseModel], where: str) -> str:
    name = ".".join([where, *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        *above, unknown = problem["loc"]
        hint = meant(str(unknown), _section(kind, above).model_fields)
        return f"{name}: there is no such setting{hint and f'; {hint}'}"
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", problem["msg"])
    said = f"{name}: {message.removeprefix('Value error, ').replace('a valid tuple', 'a list')}"
    # Keys must not be shown: they are in what was given for them, and in all of the settings together.
    hidden = not problem["loc"] or problem["loc"][0] in ("api_keys", "search")
    return said if hidden else f"{said} (got {problem['input']!r})"


def service_settings(args: dict[str, Any]) -> ServiceSettings:
    """The application's args as settings. API keys also come from CLIPFLEET_API_KEYS (comma-separated), and their file from
    CLIPFLEET_API_KEYS_FILE."""
    settings: ServiceSettings = parse(ServiceSettings, args, "args")
    keys = [key.strip() for key in os.environ.get("CLIPFLEET_API_KEYS", "").split(",") if key.strip()]
    file = settings.api_keys_file or os.environ.get("CLIPFLEET_API_KEYS_FILE") or None
    if file is not None:
        file = str(Path(file).expanduser().absolute())  # replicas have another working directory
        read_keys(file)  # a mistake shows at once
    return settings.model_copy(
        update={
            "api_keys": tuple(map(hashed, (*settings.api_keys, *keys))),  # Serve keeps what replicas are made with
            "api_keys_file": file,
            "search": _located(settings.search),
        }
    )


def _located(search: SearchSettings | None) -> SearchSettings | None:
    """With a folder by its whole path, and the key of QDRANT_API_KEY where none is set. Raises SettingsError."""
    if search is None:
        return None
    if importlib.util.find_spec("qdrant_client") is None:
        raise SettingsError("args.search needs Qdrant's client: pip install 'clipfleet[qdrant]'")
    place = place_of(search.qdrant)
    key = search.qdrant_api_key or os.environ.get("QDRANT_API_KEY") or None
    return search.model_copy(update={"qdrant": place, "qdrant_api_key": key})
