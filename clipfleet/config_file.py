"""Config files of Ray Serve: found by path or by packaged name, and checked whole before Ray starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from clipfleet.errors import SettingsError
from clipfleet.settings import BatchSettings, Count, ServiceSettings, parse, service_settings

APPLICATION = "clipfleet"
IMPORT_PATH = "deployments.graph:build"
ENCODERS = ("ImageEncoder", "TextEncoder")
DEPLOYMENTS = ("Ingress", "ImageDecoder", *ENCODERS)
# Where a file is silent.
DEFAULT_MAX_ONGOING = {"Ingress": 10_000, "ImageDecoder": 64, "ImageEncoder": 256, "TextEncoder": 256}


def read_config(source: str) -> dict[str, Any]:
    """Read a Serve config file by path, or a packaged one by bare name (`demo`), and check it whole.

    Raises SettingsError. Nothing of Ray is imported or started for it.
    """
    path = config_path(source)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:  # its own words quote the line, which may hold a key
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = re.split("['\"!*]", error.problem or "")[0].strip()  # what it quotes, too
        raise SettingsError(f"config {source!r} is no YAML{where}: {problem}") from None
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
        names = ", ".join(repr(app["name"]) for app in applications) or "none"
        raise SettingsError(f"config {source!r} must hold one application named {APPLICATION!r}, and holds {names}")
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
        if twice := [name for number, name in enumerate(listed) if name in listed[:number]]:
            raise SettingsError(f"{twice[0]} is listed twice")
        for entry in deployments:
            if isinstance(entry, dict) and entry["name"] == "Ingress":
                scaling = entry.get("autoscaling_config")
                most = scaling.get("max_replicas", 1) if scaling else entry.get("num_replicas") or 1
                check_one_ingress(settings, 100 if most == "auto" else most)
    except SettingsError as error:
        raise SettingsError(f"config {source!r}: {error.message}") from None


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


def check_one_ingress(settings: ServiceSettings, replicas: int) -> None:
    """Refuse several ingress replicas that would open one folder of Qdrant's."""
    if settings.search is not None and "://" not in settings.search.qdrant and replicas > 1:
        raise SettingsError(
            f"args.search.qdrant is a folder, which one process opens, and Ingress may have {replicas} replicas. Give the URL "
            "of a Qdrant server, or Ingress one replica"
        )
