"""`clipfleet doctor`: what is installed, what would be used and why, and whether an index can be kept."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clipfleet.config_file import APPLICATION, read_config
from clipfleet.errors import ClipfleetError, SettingsError
from clipfleet.extras import extras
from clipfleet.ports import claim_port
from clipfleet.qdrant import Collection, check_collection, place_of, shown
from clipfleet.settings import SearchSettings, service_settings
from clipfleet.threads import cores

State = Literal["good", "note", "problem"]
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be looked at. What is None is as the config file has it, or the service's default.

    `exif_orientation` and `host` are for a config file alone to say.
    """

    config: str | None = None
    model: str | None = None
    device: str | None = None
    precision: str | None = None
    engine: str | None = None
    exif_orientation: bool = True
    host: str = _LOOPBACK
    port: int | None = None
    metrics_port: int = 9464
    dest: str | None = None
    qdrant: str | None = None
    collection: str | None = None
    qdrant_api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A `note` stops nothing; a `problem` stops what was asked about."""

    about: str
    state: State
    said: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def examine(asked: Asked) -> Iterator[Finding]:
    """Look at one thing after the other. Nothing is downloaded or changed."""
    yield Finding("machine", "good", f"Python {platform.python_version()}, {platform.platform()}, {_cores()}")
    yield from _installed()
    if asked.config is not None:
        try:
            asked = _with_config(asked, asked.config)
            yield Finding("config", "good", f"{asked.config}: every setting is known, and none contradicts another")
        except ClipfleetError as error:
            yield Finding("config", "problem", error.message)
    device, precision, engine = asked.device or "auto", asked.precision or "float32", asked.engine or "auto"
    yield _tried("engine", lambda: _engine(device, precision, engine))
    model, exif = asked.model, asked.exif_orientation
    if model is not None:
        yield _tried("checkpoint", lambda: _checkpoint(model, exif))
    host, port, metrics_port = asked.host, asked.port or 8000, asked.metrics_port
    yield _tried("port", lambda: _port(host, port, "--port"))
    yield _tried("port", lambda: _port(_LOOPBACK, metrics_port, "--metrics-port"))
    yield from _indexes(asked)


def _indexes(asked: Asked) -> Iterator[Finding]:
    dest, qdrant, model, exif = asked.dest, asked.qdrant, asked.model, asked.exif_orientation
    if dest is None and qdrant is None:
        return
    if model is None:
        yield Finding("index", "problem", "name the checkpoint to compare with: --model, or a config file")
        return
    if dest is not None:
        yield _tried("DEST", lambda: _dest(dest, model, exif))
    if qdrant is not None:
        yield _tried("collection", lambda: _collection(qdrant, asked.collection, asked.qdrant_api_key, model, exif))


def _tried(about: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(about, "good", look())
    except ClipfleetError as error:
        return Finding(about, "problem", error.message)
    except ModuleNotFoundError as error:
        return Finding(about, "note", f"cannot be said without {error.name}")


def _cores() -> str:
    found = cores()
    return f"{found} core{'s' if found > 1 else ''}"


def _installed() -> Iterator[Finding]:
    for extra in extras():
        if extra.missing:
            way = f"pip install 'clipfleet[{extra.name}]'"
            said = f"not installed, it lacks {', '.join(extra.missing)}; {way}"
            yield Finding(f"[{extra.name}]", "note", said)
        else:
            said = ", ".join(f"{name} {version}" for name, version in extra.packages.items())
            yield Finding(f"[{extra.name}]", "good", said)


def _with_config(asked: Asked, config: str) -> Asked:
    """With what the config file says where nothing was asked for. Raises SettingsError."""
    content = read_config(config)
    _check_the_rest(content)
    application = next(entry for entry in content["applications"] if entry["name"] == APPLICATION)
    settings = service_settings(application.get("args") or {})
    http = content.get("http_options") or {}
    return replace(
        _with_search(asked, settings.search),
        model=asked.model or settings.model,
        device=asked.device or settings.device,
        precision=asked.precision or settings.precision,
        engine=asked.engine or settings.engine,
        exif_orientation=settings.exif_orientation,
        host=str(http.get("host") or asked.host),
        port=asked.port or http.get("port"),
    )


def _check_the_rest(content: dict[str, Any]) -> None:
    """What Serve checks of a config file. Raises SettingsError."""
    with suppress(ModuleNotFoundError):  # an install without Serve has no use for it
        from deployments.deploying import schema_of

        schema_of(content)


def _with_search(asked: Asked, search: SearchSettings | None) -> Asked:
    """With the collection that the service searches, unless --qdrant names a place of its own."""
    if asked.qdrant is not None or search is None:
        return asked
    return replace(
        asked,
        qdrant=search.qdrant,
        collection=asked.collection or search.collection,
        qdrant_api_key=search.qdrant_api_key or asked.qdrant_api_key,
    )


def _engine(device: str, precision: str, engine: str) -> str:
    from clipfleet.engines import choose_engine, resolve_device, settle_device

    settled = settle_device(device, engine, precision)
    found = resolve_device(settled)
    chosen = choose_engine(engine, found, precision)
    return f"{chosen} on {found} in {precision}: {_why(device, found)}; {_why_engine(engine, chosen, found)}"


def _why(asked: str, found: str) -> str:
    from clipfleet.engines import NVIDIA_DRIVERS

    if asked != "auto":
        return f"device {asked} was asked for"
    if not any(Path(path).exists() for path in NVIDIA_DRIVERS):
        return "this machine has no NVIDIA driver"
    import torch

    if found != "cpu":
        return f"torch sees {torch.cuda.get_device_name(0)}"
    if torch.version.cuda is None:
        return "this torch is built for CPUs"
    return "torch sees no GPU that it can use"


def _why_engine(asked: str, chosen: str, device: str) -> str:
    if asked != "auto":
        return f"engine {asked} was asked for"
    if chosen == "openvino":
        return "openvino is installed, and the faster one on CPUs"
    if device == "cpu":
        return "openvino, which is faster on CPUs, is not installed or does not do this precision"
    return "GPUs are torch's"


def _checkpoint(name: str, exif_orientation: bool) -> str:
    from clipfleet.checkpoint import find_checkpoint

    found = find_checkpoint(name, download=False)
    return f"{name}: {found.model_type} in {found.folder}, fingerprint {_fingerprint(name, exif_orientation)}"


@cache  # it reads all the weights
def _fingerprint(name: str, exif_orientation: bool) -> str:
    from clipfleet.checkpoint import find_checkpoint
    from clipfleet.fingerprint import fingerprint

    return fingerprint(find_checkpoint(name, download=False), exif_orientation=exif_orientation)


def _port(host: str, number: int, option: str) -> str:
    claim_port(host, number, option).close()
    return f"{number} is free"


def _dest(dest: str, model: str, exif_orientation: bool) -> str:
    from jobs.output import count_rows_of

    made_by = _fingerprint(model, exif_orientation)
    rows = count_rows_of(Path(dest).expanduser(), model, made_by)
    return f"{dest}: {rows:,} rows by this very checkpoint; keep it"


def _collection(place: str, name: str | None, api_key: str | None, model: str, exif_orientation: bool) -> str:
    if name is None:
        raise SettingsError("--qdrant needs --collection")
    check_collection(Collection(place_of(place), name, api_key), _fingerprint(model, exif_orientation))
    return f"{name} at {shown(place)}: by this very checkpoint; keep it"
