"""Typed settings of the service, and the only reader of YAML and environment."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clipfleet.engines import Engine, Precision, check_engine
from clipfleet.errors import SettingsError
from clipfleet.keys import fits_a_header, read_keys
from clipfleet.qdrant import place_of

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
APPLICATION = "clipfleet"
IMPORT_PATH = "deployments.graph:build"
ENCODERS = ("ImageEncoder", "TextEncoder")
DEPLOYMENTS = ("Ingress", "ImageDecoder", *ENCODERS)

Count = Annotated[int, Field(ge=1)]
LogFormat = Literal["text", "json"]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LimitSettings(Settings):
    """What one request, one image and the whole ingress may cost. Sizes are bytes, times are seconds."""

    body_bytes: Count = 64 * 1024 * 1024
    images_per_request: Count = 64
    texts_per_request: Count = 2048
    text_characters: Count = 100_000
    image_bytes: Count = 20 * 1024 * 1024
    image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 64_000_000  # Pillow's own limit stands behind ours
    image_formats: tuple[str, ...] = IMAGE_FORMATS
    deadline_s: Annotated[float, Field(gt=0)] = 30.0
    forward_s: Annotated[float, Field(gt=0)] = 60.0  # a forward pass that takes longer ends its replica
    inflight_items: Count = 4096
    inflight_items_per_key: Count | None = None
    inflight_bytes: Count = 512 * 1024 * 1024
    decoding_bytes: Count = 1024 * 1024 * 1024

    @field_validator("image_formats")
    @classmethod
    def _known(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(formats) - set(IMAGE_FORMATS)
        if unknown or not formats:
            raise ValueError(f"image_formats must be some of {', '.join(IMAGE_FORMATS)}")
        return formats


class CacheSettings(Settings):
    """Bytes of vectors that each ingress replica keeps for items that come again; 0 switches a cache off."""

    text_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    image_bytes: Annotated[int, Field(ge=0)] = 0


class UrlSettings(Settings):
    """Images by http(s) address, off unless `enabled`.

    `at_once` times `limits.image_bytes` is what a replica may hold of images that still arrive; `timeout_s` is for one image,
    in seconds; `allowed_networks` are those beside the internet's.
    """

    enabled: bool = False
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    redirects: Annotated[int, Field(ge=0, le=10)] = 3
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    at_once: Count = 8
    allowed_networks: tuple[str, ...] = ()

    @field_validator("allowed_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)  # a ValueError that names it
        return networks


class SearchSettings(Settings):
    """The Qdrant collection that `/v1/search` searches: `qdrant` is a server's URL, or a folder, which one ingress opens.

    A text is searched for by the mean of `templates`, in which {} stands for it.
    """

    qdrant: str
    collection: str = "images"
    qdrant_api_key: Annotated[str | None, Field(repr=False)] = None
    templates: Annotated[tuple[str, ...], Field(min_length=1, max_length=100)] = ("{}",)

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
    served_model_name: str | None = None
    device: str = "auto"
    precision: Precision = "float32"
    engine: Engine = "auto"
    gpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    threads_per_replica: Count | None = None
    exif_orientation: bool = True
    reduced_jpeg: bool = False
    limits: LimitSettings = LimitSettings()
    cache: CacheSettings = CacheSettings()
    image_urls: UrlSettings = UrlSettings()
    search: SearchSettings | None = None
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    api_keys_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    log_format: LogFormat = "text"
    page: bool = True

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
    """The `user_config` of an encoder: may change while it runs.

    `max_batch_size` counts items; `batch_wait_timeout_s` is how long a batch that is not full waits for
    company while the model is idle.
    """

    max_batch_size: Count = 32
    batch_wait_timeout_s: Annotated[float, Field(ge=0, le=5)] = 0.0


def parse(kind: type[BaseModel], values: dict[str, Any] | None, where: str) -> Any:
    """Validate settings, or raise a SettingsError with one line a problem."""
    try:
        return kind.model_validate(values or {})
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem, where) for problem in error.errors())) from None


def _explain(problem: Any, where: str) -> str:
    name = ".".join([where, *(str(part) for part in problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"{name}: there is no such setting"
    said = f"{name}: {problem['msg'].removeprefix('Value error, ')}"
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
        update={"api_keys": (*settings.api_keys, *keys), "api_keys_file": file, "search": _located(settings.search)}
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


def check_batching(
    deployment: str, batch: BatchSettings, max_ongoing_requests: int, target_ongoing_requests: float | None
) -> None:
    """Refuse settings of an encoder that contradict each other; the error names both."""
    if max_ongoing_requests < batch.max_batch_size:
        raise SettingsError(
            f"{deployment}: max_ongoing_requests {max_ongoing_requests} is below max_batch_size "
            f"{batch.max_batch_size} x max_concurrent_batches 1, so batches can never fill. "
            f"Raise max_ongoing_requests to {batch.max_batch_size} or more (twice that keeps the model busy), "
            "or lower max_batch_size"
        )
    if target_ongoing_requests is not None and target_ongoing_requests < batch.max_batch_size:
        raise SettingsError(
            f"{deployment}: target_ongoing_requests {target_ongoing_requests:g} is below max_batch_size "
            f"{batch.max_batch_size}, so replicas are added before batches fill. "
            f"Raise target_ongoing_requests to {batch.max_batch_size} or more, or lower max_batch_size"
        )


def check_scaling(deployment: str, max_ongoing_requests: int, target_ongoing_requests: float | None) -> None:
    """Refuse settings of any deployment that contradict each other; the error names both."""
    if target_ongoing_requests is not None and target_ongoing_requests > max_ongoing_requests:
        raise SettingsError(
            f"{deployment}: target_ongoing_requests {target_ongoing_requests:g} is above max_ongoing_requests "
            f"{max_ongoing_requests}, so replicas are never added. Lower the first or raise the second"
        )


class AutoscalingSettings(BaseModel):
    """What is checked of an `autoscaling_config`; Serve checks the rest. The defaults are Serve's (ray 2.60)."""

    min_replicas: Count = 1  # /readyz asks every deployment for a sign of life, so none may be scaled to nothing
    max_replicas: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 2.0


class DeploymentSettings(BaseModel):
    """What is checked of an entry of `deployments:`; Serve checks the rest."""

    name: Literal["Ingress", "ImageDecoder", "ImageEncoder", "TextEncoder"]
    num_replicas: Count | Literal["auto"] | None = None
    max_ongoing_requests: Count | None = None
    autoscaling_config: AutoscalingSettings | None = None
    ray_actor_options: dict[str, Any] | None = None
    user_config: dict[str, Any] | None = None
    max_queued_requests: int | None = None


def check_deployment(entry: Any) -> str:
    """Check one entry of `deployments:` and return its name; what it does not give is as deployments/graph.py has it."""
    name = entry.get("name") if isinstance(entry, dict) else entry
    if name not in DEPLOYMENTS:
        raise SettingsError(f"there is no deployment {name!r}; the graph has {', '.join(DEPLOYMENTS)}")
    options = parse(DeploymentSettings, entry, name)
    scaling = options.autoscaling_config or (AutoscalingSettings() if options.num_replicas == "auto" else None)
    ceiling = options.max_ongoing_requests or DEFAULT_MAX_ONGOING[name]
    target = scaling.target_ongoing_requests if scaling else None
    check_scaling(name, ceiling, target)
    if (given := options.autoscaling_config) and given.min_replicas > given.max_replicas:
        raise SettingsError(f"{name}: min_replicas {given.min_replicas} is above max_replicas {given.max_replicas}")
    if name == "Ingress" and options.max_queued_requests is not None and options.max_queued_requests >= 0:
        raise SettingsError("Ingress: max_queued_requests would refuse in plain text; use args.limits.inflight_items")
    if name not in ENCODERS and options.user_config:
        raise SettingsError(f"{name} takes no user_config; only {' and '.join(ENCODERS)} do")
    if name in ENCODERS:
        batch = parse(BatchSettings, options.user_config, f"{name}.user_config")
        check_batching(name, batch, ceiling, target)
        if options.ray_actor_options:
            raise SettingsError(
                f"{name}: ray_actor_options would replace what args set; use args.gpus_per_replica and "
                "args.cpus_per_replica instead"
            )
    return name


def check_one_ingress(settings: ServiceSettings, replicas: int) -> None:
    """Refuse several ingress replicas that would open one folder of Qdrant's."""
    if settings.search is not None and "://" not in settings.search.qdrant and replicas > 1:
        raise SettingsError(
            f"args.search.qdrant is a folder, which one process opens, and Ingress may have {replicas} replicas. Give the URL "
            "of a Qdrant server, or Ingress one replica"
        )


DEFAULT_MAX_ONGOING = {"Ingress": 10_000, "ImageDecoder": 64, "ImageEncoder": 256, "TextEncoder": 256}


def read_config(source: str) -> dict[str, Any]:
    """Read a Serve config file by path, or a packaged one by bare name (`demo`), and check it whole.

    Raises SettingsError. Nothing of Ray is imported or started for it.
    """
    path = config_path(source)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config {source!r} cannot be read: {error}") from error
    check_config(config, source)
    return config


def config_path(source: str) -> Path:
    """Find a config file: an existing path, or a packaged name with or without `.yaml`."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    bare = path.name.removesuffix(".yaml")
    if path.parent == Path() or path.parent.name == "configs":
        for folder in _packaged_folders():
            for candidate in (folder / "configs" / f"{bare}.yaml", folder / f"{bare}.yaml"):
                if candidate.is_file():
                    return candidate
    kinds = ("configs/*.yaml", "serve_config.yaml")
    names = sorted({file.stem for folder in _packaged_folders() for kind in kinds for file in folder.glob(kind)})
    raise SettingsError(f"there is no config file {source!r}; packaged ones are {', '.join(names)}")


def _packaged_folders() -> list[Path]:
    root = Path(__file__).parent.parent
    return [root, root / "deployments"]  # a checkout keeps them at its top, the wheel inside deployments/


def check_config(config: Any, source: str) -> None:
    """Check every part of a config file that is ours, so that a mistake shows before Ray starts."""
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list):
        raise SettingsError(f"config {source!r} has no list `applications`")
    if not all(isinstance(app, dict) and isinstance(app.get("name"), str) for app in applications):
        raise SettingsError(f"config {source!r}: every application must be an object with a name")
    ours = [app for app in applications if app["name"] == APPLICATION]
    if len(ours) != 1:
        raise SettingsError(f"config {source!r} must hold one application named {APPLICATION!r}, not {len(ours)}")
    if ours[0].get("import_path") != IMPORT_PATH:
        raise SettingsError(f"config {source!r}: import_path must be {IMPORT_PATH!r}")
    http = config.get("http_options") or {}
    port = http.get("port", 8000) if isinstance(http, dict) else None
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise SettingsError(f"config {source!r}: http_options must be an object, and its port a number from 1 to 65535")
    arguments, deployments = ours[0].get("args") or {}, ours[0].get("deployments") or []
    if not isinstance(arguments, dict) or not isinstance(deployments, list):
        raise SettingsError(f"config {source!r}: args must be an object and deployments a list")
    settings = service_settings(arguments)
    try:
        listed = [check_deployment(entry) for entry in deployments]
        for entry in deployments:
            if isinstance(entry, dict) and entry["name"] == "Ingress":
                scaling = entry.get("autoscaling_config")
                most = scaling.get("max_replicas", 1) if scaling else entry.get("num_replicas") or 1
                check_one_ingress(settings, 100 if most == "auto" else most)
        if len(set(listed)) < len(listed):
            raise SettingsError("a deployment is listed twice")
    except SettingsError as error:
        raise SettingsError(f"config {source!r}: {error.message}") from None
