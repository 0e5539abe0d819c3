"""A Ray of one command's own: on loopback alone, with its files in a private folder that goes when the command ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from clipfleet.errors import SetupError
from deployments.guardian import MARK

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 512 * 2**20  # Ray's default of 30% is memory that models need


def make_folder() -> Path:
    """The instance's private folder. Its path is short: a Unix socket's may have 107 bytes, a node id takes 56 of them."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="cf-", dir=base if len(base) <= 16 else "/tmp")).resolve()


def set_environment(folder: Path, more: Mapping[str, str] | None = None) -> None:
    """Set what Ray reads when it is imported, together with `more`. A variable that the user set already wins."""
    os.environ[MARK] = str(folder)  # how the guardian knows this instance's processes
    values = {
        "RAY_USAGE_STATS_ENABLED": "0",  # Ray sends usage statistics to its makers unless told not to
        # Ray takes a loopback address of its node only with its support for clusters off (as it is on macOS); with any other
        # address all its parts listen on all interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",  # Ray's default here (~/.ray/auth_token), set so that it does not announce it on stderr
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would build an environment anew for each worker
        # Workers in stock would lack the environment of a service's replicas and of a job's actors: nobody takes them.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray announces as its coming default
        **(more or {}),
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def _signals_held() -> Iterator[None]:
    """An exception in the midst of ray's import or of ray.init leaves half of it behind, which ray.shutdown does not
    know of: the process could hang then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])  # to whom it was meant for


@_signals_held()
def init(**options: Any) -> None:
    """Call ray.init. A signal that comes meanwhile takes effect when it has returned; a second one at once."""
    import ray
    import ray._private.utils

    ray._private.utils.set_sigterm_handler = lambda _: None  # the command's own handlers stop Ray in order
    ray.init(**options)


@_signals_held()
def start_ray(folder: Path, **options: Any) -> None:
    """Start a Ray in `folder`, with further options of ray.init. What it runs logs to files: the terminal is the command's."""
    import ray._private.node
    import ray._private.services as services
    import ray._private.worker

    class Apart(services.ConsolePopen):
        """Ray's processes in sessions of their own: `kill %1` in a shell, or the terminal's end, must reach the command
        alone, which stops them in order. A Ray that loses its GCS first blocks its driver for a minute."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "start_new_session": True})

    services.ConsolePopen = Apart
    # Ray prints its own words about failed tasks and placement to our terminal, whatever log_to_driver says.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    with _without_spares(ray._private.node.Node):
        init(
            address="local",  # without it Ray would join the last cluster that this machine started
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(folder),
            **options,
        )


@contextmanager
def _without_spares(node: Any) -> Iterator[None]:
    """Three processes that a Ray of one machine without a dashboard has no use for: 1.5 s of a core, and 170 MB."""
    spares = {name: getattr(node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in spares:
        setattr(node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in spares.items():
            setattr(node, name, start)


def is_lost() -> bool:
    """Whether a part of our Ray has died, as when a signal went to all processes of a service unit.

    Each call that needs Ray, ray.shutdown too, would then wait for a minute and end this process; so would its exit.
    """
    if "ray" not in sys.modules:
        return False
    import ray._private.worker

    node = ray._private.worker._global_node
    if node is None:
        return False
    time.sleep(0.3)  # for parts that got the signal together with us
    return bool(node.dead_processes())


@contextmanager
def ended_with_ray(message: str) -> Iterator[None]:
    """End this process with `message` and status 1 when a part of our Ray dies in the block. Ray itself would do so after 15 s
    or a minute, and as often as not without a word. `message` has a place {} for what died."""
    import ray._private.worker

    node: Any = ray._private.worker._global_node
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            if (dead := node.dead_processes()) and not over.is_set():
                leave_at_once(SetupError(message.format(" and ".join(sorted({name for name, _ in dead})))))

    watching = threading.Thread(target=watch, name="ray-watch", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def leave_at_once(error: BaseException | None) -> NoReturn:
    """End this process without Python's exit, which would crash in the threads of a lost Ray. Ctrl-C and SIGTERM end well."""
    stopped = error is None or isinstance(error, KeyboardInterrupt)
    if not stopped:
        print(f"clipfleet: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if stopped else 1)


def unreachable(address: str) -> str | None:
    """Why nobody answers at a Ray's address HOST:PORT; None if somebody does. Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return None  # "auto" and the like, which Ray explains at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
