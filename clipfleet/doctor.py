"""`clipfleet doctor`: what is installed, what would be used and why, and whether an index can be kept."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clipfleet.errors import ClipfleetError, SettingsError

State = Literal["good", "note", "problem"]
_EXTRAS = ("local", "serve", "openvino", "qdrant")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A `note` stops nothing; a `problem` stops what was asked about."""

    about: str
    state: State
    said: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def examine(
    config: str | None,
    model: str | None,
    device: str | None,
    precision: str | None,
    engine: str | None,
    port: int | None,
    metrics_port: int,
    dest: str | None,
    qdrant: str | None,
    collection: str | None,
    qdrant_api_key: str | None,
) -> Iterator[Finding]:
    """Look at one thing after the other. What is not given is as the config file has it; nothing is downloaded or changed."""
    yield Finding("machine", "good", f"Python {platform.python_version()}, {platform.platform()}, {_cores()}")
    yield from _installed()
    arguments: dict[str, Any] = {}
    if config is not None:
        try:
            arguments, port = _of_config(config, port)
            yield Finding("config", "good", f"{config}: every setting is known, and none contradicts another")
        except ClipfleetError as error:
            yield Finding("config", "problem", error.message)
    asked = {
        "device": device or arguments.get("device", "auto"),
        "precision": precision or arguments.get("precision", "float32"),
        "engine": engine or arguments.get("engine", "auto"),
    }
    yield _tried("engine", lambda: _engine(**asked))
    checkpoint = model or arguments.get("model")
    exif = bool(arguments.get("exif_orientation", True))
    if checkpoint is not None:
        yield _tried("checkpoint", lambda: _checkpoint(checkpoint, exif))
    for number, option in ((port or 8000, "--port"), (metrics_port, "--metrics-port")):
        yield _tried("port", lambda number=number, option=option: _port(number, option))
    if dest is not None or qdrant is not None:
        if checkpoint is None:
            yield Finding("index", "problem", "name the checkpoint to compare with: --model, or a config file")
            return
        if dest is not None:
            yield _tried("DEST", lambda: _dest(dest, checkpoint, exif))
        if qdrant is not None:
            yield _tried("collection", lambda: _collection(qdrant, collection, qdrant_api_key, checkpoint, exif))


def _tried(about: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(about, "good", look())
    except ClipfleetError as error:
        return Finding(about, "problem", error.message)
    except ModuleNotFoundError as error:
        return Finding(about, "note", f"cannot be said without {error.name}")


def _cores() -> str:
    from clipfleet.threads import cores

    found = cores()
    return f"{found} core{'s' if found > 1 else ''}"


def _installed() -> Iterator[Finding]:
    needed = _needed()
    for extra in _EXTRAS:
        missing = [name for name in needed[extra] if _version(name) is None]
        if missing:
            way = f"pip install 'clipfleet[{extra}]'"
            yield Finding(f"[{extra}]", "note", f"not installed, it lacks {', '.join(missing)}; {way}")
        else:
            yield Finding(f"[{extra}]", "good", ", ".join(f"{name} {_version(name)}" for name in needed[extra]))


def _needed() -> dict[str, list[str]]:
    """The packages of each extra, without those of the extras that it includes."""
    found: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    for line in importlib.metadata.requires("clipfleet") or []:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)", line)
        here = "sys_platform" not in line or sys.platform in line
        if name and extra and extra[1] in found and name[0] != "clipfleet" and here:
            found[extra[1]].append(name[0])
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of_config(config: str, port: int | None) -> tuple[dict[str, Any], int]:
    from clipfleet.settings import APPLICATION, read_config, service_settings

    content = read_config(config)
    application = next(entry for entry in content["applications"] if entry["name"] == APPLICATION)
    settings = service_settings(application.get("args") or {})
    return settings.model_dump(), port or (content.get("http_options") or {}).get("port", 8000)


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
    from clipfleet.fingerprint import fingerprint

    found = find_checkpoint(name, download=False)
    made_by = fingerprint(found, exif_orientation=exif_orientation)
    return f"{name}: {found.model_type} in {found.folder}, fingerprint {made_by}"


def _port(number: int, option: str) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            raise SettingsError(f"{number} is not free ({error.strerror}); choose another one: {option}") from None
    return f"{number} is free"


def _dest(dest: str, model: str, exif_orientation: bool) -> str:
    from clipfleet.checkpoint import find_checkpoint
    from clipfleet.fingerprint import fingerprint
    from jobs.output import count_rows_of

    folder = Path(dest).expanduser()
    made_by = fingerprint(find_checkpoint(model, download=False), exif_orientation=exif_orientation)
    rows = count_rows_of(folder, model, made_by)
    return f"{dest}: {rows:,} rows by this very checkpoint; keep it"


def _collection(place: str, name: str | None, api_key: str | None, model: str, exif_orientation: bool) -> str:
    from clipfleet.checkpoint import find_checkpoint
    from clipfleet.fingerprint import fingerprint
    from clipfleet.qdrant import Collection, place_of

    if name is None:
        raise SettingsError("--qdrant needs --collection")
    with Collection(place_of(place), name, api_key).opened() as points:
        if not points.exists():
            raise SettingsError(f"there is no collection {name!r} at {place!r}")
        points.check(fingerprint(find_checkpoint(model, download=False), exif_orientation=exif_orientation))
    return f"{name} at {place}: by this very checkpoint; keep it"
