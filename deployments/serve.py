"""`clipfleet serve`: settings to a running service, and nothing left of it afterwards."""

from __future__ import annotations

import copy
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from clipfleet.checkpoint import EMBEDDED, find_checkpoint
from clipfleet.errors import SettingsError, SetupError
from clipfleet.keys import KeyRing
from clipfleet.settings import APPLICATION, ServiceSettings, service_settings
from deployments.local_ray import Service, local_service

_READY_S = 120  # from running replicas to a first success of each


def serve_until_stopped(
    config: dict[str, Any],
    *,
    model: str | None,
    host: str | None,
    port: int | None,
    metrics_port: int,
    open_to_all: bool,
    tls: Path | None,
    say: Callable[[str], Any],
) -> None:
    """Serve a checked config file's content until Ctrl-C or SIGTERM. Raises SetupError and its kin."""
    config = copy.deepcopy(config)
    http = config.get("http_options") or {}
    arguments = _arguments(config)
    if model is not None:
        arguments["model"] = model
    listen: str = host or http.get("host", "127.0.0.1")
    settings = service_settings(arguments)
    if not (open_to_all or KeyRing(settings.api_keys, settings.api_keys_file).asks or _is_loopback(listen)):
        raise SettingsError(
            f"{listen} can be reached from other machines, and no API keys are set. Make one with `clipfleet keys add NAME "
            "--file FILE` and set CLIPFLEET_API_KEYS_FILE=FILE, or say --open to serve whoever comes"
        )
    certificate = _check_certificate(tls) if tls else ""
    if not os.environ.get("RAY_ADDRESS"):  # a remote cluster finds checkpoints for itself
        arguments.update(_pinned(settings))
    try:
        with local_service(
            config,
            host=listen,
            port=port or http.get("port", 8000),
            metrics_port=metrics_port,
            certificate=certificate,
        ) as service:
            prefix = (_application(config).get("route_prefix") or "/").rstrip("/")
            say(f"clipfleet ready: {_url(service)}{prefix} model={wait_until_ready(service, prefix, arguments)}")
            service.wait()
    except KeyboardInterrupt:  # during the start, which has cleaned up after itself
        return


def _check_certificate(file: Path) -> str:
    """The absolute path of a PEM file that holds a certificate chain and its private key."""
    if os.environ.get("RAY_ADDRESS"):
        raise SettingsError("--tls is for a Ray of the command's own; with RAY_ADDRESS a proxy in front speaks TLS")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(file, password=lambda: "")  # no prompt
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"{str(file)!r} is no PEM file of a certificate chain and its private key: {error}"
        ) from None
    return str(file.expanduser().absolute())


def _is_loopback(host: str) -> bool:
    """Whether a name or address to listen on is this machine's own, for itself alone."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _application(config: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in config["applications"] if entry["name"] == APPLICATION)


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    application = _application(config)
    application["args"] = dict(application.get("args") or {})
    return application["args"]


def _pinned(settings: ServiceSettings) -> dict[str, Any]:
    """Find the checkpoint once, before Ray starts: a mistake shows at once, and all replicas load the same revision."""
    checkpoint = find_checkpoint(settings.model)
    name = settings.served_model_name or checkpoint.served_name
    pinned = {"served_model_name": name}
    if settings.api_keys_file:
        pinned["api_keys_file"] = settings.api_keys_file  # absolute: replicas may run elsewhere
    if settings.model in EMBEDDED:
        return pinned
    if checkpoint.revision:
        return {**pinned, "model": f"{settings.model.partition('@')[0]}@{checkpoint.revision}"}
    return {**pinned, "model": str(Path(settings.model).expanduser().resolve())}


def _url(service: Service) -> str:
    host = f"[{service.host}]" if ":" in service.host else service.host
    return f"{'https' if service.tls else 'http'}://{host}:{service.port}"


def wait_until_ready(service: Service, prefix: str, arguments: dict[str, Any]) -> str:
    """Wait for the first success of every deployment; returns the served id. Raises SetupError after two minutes."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(service.host, service.host)
    base = _url(replace(service, host=local))
    deadline = time.monotonic() + _READY_S
    state = "no answer"
    while time.monotonic() < deadline:
        try:
            # Its certificate is made for the name that clients use.
            answer = httpx.get(f"{base}{prefix}/readyz", timeout=10, trust_env=False, verify=False)
            if answer.status_code == 200:
                return arguments.get("served_model_name") or arguments["model"]
            state = answer.text
        except httpx.HTTPError as error:
            state = str(error)
        time.sleep(0.1)
    raise SetupError(f"the service did not become ready in {_READY_S} s: {state}")
