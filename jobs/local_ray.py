"""The Ray that a job runs on: one of its own, or a running one that it leaves as it was.

A Ray of our own listens on loopback alone and keeps its files in a private folder. A guardian, a small process of
the standard library alone, outlives the job's process and ends what that left behind, also after `kill -9`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])
LOOPBACK = "127.0.0.1"
MARK = "CLIPFLEET_INSTANCE"  # every process of our Ray inherits this variable; its value is the Ray's folder
PLACEMENT_S = 60
DECODE_CPUS = 0.5  # of one decode task, which runs its decoder on one core
OBJECT_STORE_BYTES = 512 * 2**20


def job_error(message: str) -> Exception:
    from clipfleet.errors import JobError  # here, because the guardian runs without site-packages

    return JobError(message)


@dataclass(frozen=True)
class Resources:
    """What each encoder reserves, and how many there are."""

    actors: int
    cpus: float
    gpus: float
    threads: int


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to the Ray at `address` or RAY_ADDRESS, or start one. Yields whether it is our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage statistics to its makers unless told not to
    address = address or os.environ.get("RAY_ADDRESS")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield False
    elif address:
        with _their_ray(address):
            yield False
    else:
        with _own_ray():
            yield True


@contextmanager
def _their_ray(address: str) -> Iterator[None]:
    import ray

    try:
        with _silent_core():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
        raise job_error(f"cannot connect to the Ray at {address!r}: {lines[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()  # disconnects; what was running goes on


@contextmanager
def _own_ray() -> Iterator[None]:
    base = tempfile.gettempdir()  # short, because a Unix socket's path may have 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="cf-", dir=base if len(base) <= 16 else "/tmp")).resolve()
    guardian = _start_guardian(folder)
    before = dict(os.environ)
    try:
        _start_ray(folder)
        yield
    finally:
        with suppress(Exception):
            import ray

            ray.shutdown()
        guardian.communicate(timeout=30)
        os.environ.clear()
        os.environ.update(before)


def _start_ray(folder: Path) -> None:
    os.environ[MARK] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))  # for Ray's workers
    # Ray takes a loopback address of its node only with its support for clusters off (as it is on macOS); with any
    # other address all its parts listen on all interfaces.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, set so that it does not announce it on stderr
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` Ray would build an environment anew
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray announces as its coming default
    import ray
    import ray._private.worker

    # Ray prints its own words about failed tasks to our terminal, whatever log_to_driver says.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    with _silent_core():
        ray.init(
            address="local",  # without it Ray would join the last cluster that this machine started
            num_cpus=max(2, len(os.sched_getaffinity(0))),  # on one core, encoder and decoders take turns
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,  # workers log to files; the terminal belongs to the job
            object_store_memory=OBJECT_STORE_BYTES,  # Ray's default of 30% is memory that models need
            _node_ip_address=LOOPBACK,
            _temp_dir=str(folder),
        )


@contextmanager
def _silent_core() -> Iterator[None]:
    """Keep Ray's C++ part off the terminal: it prints warnings past every setting but this, and this it announces."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def place(actors: int | None, cpus: float | None, gpus: float, device: str, own: bool) -> Resources:
    """Decide what the encoders reserve, and wait until that is free. Raises JobError if it is not within 60 s."""
    import ray

    cores = int(ray.cluster_resources().get("CPU", 1))
    gpus_there = ray.cluster_resources().get("GPU", 0.0)
    on_gpu = device.startswith("cuda") or (device == "auto" and gpus_there > 0)
    count = actors or (max(1, int(gpus_there / gpus)) if on_gpu else max(1, cores // 16))
    reserved = cpus or (0.5 if own or on_gpu else 1.0)
    threads = max(1, cores // count) if own else max(1, round(reserved))
    resources = Resources(count, reserved, gpus if on_gpu else 0.0, threads)
    deadline = time.monotonic() + (0 if own else PLACEMENT_S)  # nothing comes free on a Ray of our own
    while not _fits(resources, ray.available_resources()):
        if time.monotonic() > deadline:
            raise job_error(_no_room(resources, ray.available_resources()))
        time.sleep(1)
    return resources


def _asked(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.actors * resources.cpus + DECODE_CPUS, "GPU": resources.actors * resources.gpus}


def _fits(resources: Resources, free: dict[str, float]) -> bool:
    return all(free.get(name, 0) >= needed for name, needed in _asked(resources).items() if needed)


def _no_room(resources: Resources, free: dict[str, float]) -> str:
    asked = _asked(resources)
    gpus = f" and {asked['GPU']:g} GPUs" if asked["GPU"] else ""
    free_gpus = f" and {free.get('GPU', 0):g} GPUs" if asked["GPU"] else ""
    return (
        f"the encoders cannot be placed: {resources.actors} actors and a decoder ask for {asked['CPU']:g} CPUs{gpus}, "
        f"free are {free.get('CPU', 0):g} CPUs{free_gpus}. Ask for fewer with --actors"
    )


def _start_guardian(folder: Path) -> subprocess.Popen[bytes]:
    code = "import sys; sys.path.append(sys.argv[1]); from jobs.local_ray import guard; guard(*sys.argv[2:])"
    command = [sys.executable, "-I", "-S", "-c", code, _ROOT, str(folder), str(os.getpid())]
    # A session of its own: Ctrl-C and the end of the terminal must not reach it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def guard(folder: str, job: str) -> None:
    """Wait until the process `job` has closed our stdin or died; then end the other processes and remove the folder."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + 20
    clear = 0
    while clear < 3 and time.monotonic() < deadline:  # a process may be born while we look
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []
        members = [pid for pid in pids if pid not in (os.getpid(), int(job)) and _belongs(pid, folder)]
        clear = 0 if members else clear + 1
        for pid in members:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(pid: int, folder: str) -> bool:
    """A process that carries the mark, or (Ray's write their titles over it) has a file of the folder open to write."""
    process = Path("/proc") / str(pid)
    with suppress(OSError):
        if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        for link in (process / "fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith(f"{folder}/") and link.lstat().st_mode & 0o200:
                    return True
    return False


@contextmanager
def quiet_data() -> Iterator[None]:
    """Ray Data's settings for datasets that are made meanwhile: no bars and no words of its own on the terminal."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors reach us as exceptions
    context = ray.data.DataContext.get_current()
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_consecutive_actor_init_deaths": 3,  # by default one encoder killed while it loads would end the job
    }
    before = {name: getattr(context, name) for name in ours}
    try:
        for name, value in ours.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
