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
from clipfleet.config_file import APPLICATION, check_config
from clipfleet.errors import ClipfleetError, SettingsError, SetupError
from clipfleet.fingerprint import fingerprint
from clipfleet.keys import KeyRing, hashed
from clipfleet.qdrant import Collection, check_collection
from clipfleet.settings import ServiceSettings, service_settings
from deployments import signals
from deployments.local_ray import Service, local_service

_READY_S = 120  # from running replicas to a first success of each


def serve_until_stopped(
    config: dict[str, Any],
    read_again: Callable[[], dict[str, Any]],
    *,
    model: str | None,
    host: str | None,
    port: int | None,
    metrics_port: int,
    open_to_all: bool,
    tls: Path | None,
    search: dict[str, str] | None,
    say: Callable[..., Any],
) -> None:
    """Serve a checked config file's content until Ctrl-C or SIGTERM; SIGHUP reads it again. Raises SetupError and its kin.

    `say` prints a line, with `err` on stderr.
    """
    http = config.get("http_options") or {}
    listen: str = host or http.get("host", "127.0.0.1")
    public = _public(listen, open_to_all)

    def prepared(config: dict[str, Any]) -> dict[str, Any]:
        return _prepared(config, model, search, public)

    def listens(address: str) -> None:
        nonlocal public
        public = _public(address, open_to_all)
        prepared(config)

    config = prepared(config)
    _check_search(service_settings(_arguments(config)), say)
    certificate = _check_certificate(tls) if tls else ""
    try:
        with (
            signals.hangups() as hangup,
            local_service(
                config,
                host=listen,
                port=port or http.get("port", 8000),
                metrics_port=metrics_port,
                certificate=certificate,
                listens=listens,  # a Serve that runs already may listen elsewhere
            ) as service,
        ):
            wait_until_ready(service, _prefix(config))
            say(_ready(service, config))
            while hangup.wait():
                hangup.clear()
                _upgrade(service, lambda: prepared(read_again()), say)
    except KeyboardInterrupt:  # during the start, which has cleaned up after itself
        return


def _prepared(
    config: dict[str, Any], model: str | None, search: dict[str, str] | None, public: str | None
) -> dict[str, Any]:
    """The config with what the command line says of its application, and its checkpoint found. `public` is the address that
    others reach and must have keys for."""
    config = copy.deepcopy(config)
    application = _application(config)
    arguments = application["args"] = dict(application.get("args") or {})
    if model is not None:
        arguments["model"] = model
    if search is not None:
        arguments["search"] = {**(arguments.get("search") or {}), **search}
        check_config(config, "with --index")  # with the ingress replicas
    settings = service_settings(arguments)
    remote = os.environ.get("RAY_ADDRESS")
    if remote:  # whose processes have variables of their own
        asks = bool(arguments.get("api_keys") or arguments.get("api_keys_file"))
        way = "name FILE in the config file as args.api_keys_file, by a path that each node of the cluster has"
    else:
        asks = KeyRing(settings.api_keys, settings.api_keys_file).asks
        way = "set CLIPFLEET_API_KEYS_FILE=FILE"
    if public and not asks:
        raise SettingsError(
            f"{public} can be reached from other machines, and no API keys are set. Make one with `clipfleet keys add NAME "
            f"--file FILE` and {way}, or say --open to serve whoever comes"
        )
    if "api_keys" in arguments:  # Serve writes the arguments into its log
        arguments["api_keys"] = list(map(hashed, arguments["api_keys"] or ()))
    if not remote:  # a remote cluster finds checkpoints for itself
        arguments.update(_pinned(settings))
        if settings.search is not None:
            arguments["search"] = {**arguments["search"], "qdrant": settings.search.qdrant}  # absolute
    return config


def _check_search(settings: ServiceSettings, say: Callable[..., Any], *, must: bool = True) -> None:
    """Raise what is wrong with a folder that `must` be searched; say what is wrong with a server, which may come later."""
    search = settings.search
    if search is None or os.environ.get("RAY_ADDRESS"):  # a remote cluster reaches it for itself
        return
    collection = Collection(search.qdrant, search.collection, search.qdrant_api_key)
    made_by = fingerprint(find_checkpoint(settings.model), exif_orientation=settings.exif_orientation)
    try:
        check_collection(collection, made_by)
    except ClipfleetError as error:
        if must and collection.is_folder:
            raise
        say(f"clipfleet: searches will get 503 for now: {error.message}", err=True)


def _upgrade(service: Service, read: Callable[[], dict[str, Any]], say: Callable[..., Any]) -> None:
    """Put what the config file says now in place of what runs; where that fails, what runs goes on."""
    say("clipfleet: reading the config file again")
    try:
        config = read()
        _check_search(service_settings(_arguments(config)), say, must=False)  # its index may be made after the change
        same = _same_checkpoint(service, config)
        in_place = service.deployed.changes_in_place(config, same=same)
        say(f"clipfleet: {'changing what runs' if in_place else 'starting a new graph beside the one that runs'}")
        service.deployed.upgrade(config, lambda prefix: _is_ready(service, prefix)[0], same=same)
    except ClipfleetError as error:
        say(f"clipfleet: nothing was changed: {error.message}", err=True)
    except Exception as error:  # of Ray or the network: no reason to stop what works
        say(f"clipfleet: nothing was changed: {type(error).__name__}: {error}", err=True)
    else:
        say(_ready(service, config))


def _same_checkpoint(service: Service, config: dict[str, Any]) -> bool:
    """Whether the running encoders have the very files that the config's checkpoint has now."""
    from deployments.responses import FINGERPRINT_HEADER

    settings = service_settings(_arguments(config))
    now = fingerprint(find_checkpoint(settings.model), exif_orientation=settings.exif_orientation)
    answer = _get(service, f"{_prefix(service.deployed.config)}/readyz")
    return answer.headers.get(FINGERPRINT_HEADER) == now


def _ready(service: Service, config: dict[str, Any]) -> str:
    arguments = _arguments(config)
    settings = service_settings(arguments)
    model = settings.served_model_name or settings.model
    return f"clipfleet ready: {_url(service)}{_prefix(config)} model={model}"


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


def _public(address: str, open_to_all: bool) -> str | None:
    """The address if others reach it and keys are needed for that."""
    return None if open_to_all or _is_loopback(address) else address


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
    return _application(config)["args"]


def _prefix(config: dict[str, Any]) -> str:
    return (_application(config).get("route_prefix") or "/").rstrip("/")


def _pinned(settings: ServiceSettings) -> dict[str, Any]:
    """Find the checkpoint once, before Ray starts: a mistake shows at once, and all replicas load the same revision."""
    checkpoint = find_checkpoint(settings.model)
    name = settings.served_model_name or checkpoint.served_name
    pinned: dict[str, Any] = {"served_model_name": name}
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


def wait_until_ready(service: Service, prefix: str) -> None:
    """Wait for the first success of every deployment. Raises SetupError after two minutes."""
    deadline = time.monotonic() + _READY_S
    state = "no answer"
    while time.monotonic() < deadline:
        ready, state = _is_ready(service, prefix)
        if ready:
            return
        time.sleep(0.1)
    raise SetupError(f"the service did not become ready in {_READY_S} s: {state}")


def _is_ready(service: Service, prefix: str) -> tuple[bool, str]:
    """Whether the application at a route prefix works, and what it says of that."""
    try:
        answer = _get(service, f"{prefix}/readyz")
    except httpx.HTTPError as error:
        return False, str(error)
    return answer.status_code == 200, answer.text


def _get(service: Service, path: str) -> httpx.Response:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(service.host, service.host)
    # Its certificate is made for the name that clients use.
    return httpx.get(_url(replace(service, host=local)) + path, timeout=10, trust_env=False, verify=False)
