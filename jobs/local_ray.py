"""The Ray that a job runs on: one of its own, or a running one that it leaves as it was."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clipfleet.errors import JobError
from clipfleet.threads import cores as own_cores
from deployments.guardian import start_guardian
from deployments.private_ray import (
    ended_with_ray,
    init,
    is_lost,
    leave_at_once,
    make_folder,
    set_environment,
    start_ray,
    unreachable,
)
from jobs.destination import GO_ON

_ROOT = str(Path(__file__).resolve().parents[1])
PLACEMENT_S = 60
_LOST = f"the job stopped: its Ray has died ({{}}). {GO_ON}"
DECODE_CPUS = 0.5  # of one decode task, which runs its decoder on one core


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
    if reason := unreachable(address):
        raise JobError(f"cannot connect to the Ray at {address!r}: {reason}")
    try:
        with _silent_core():
            init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
        raise JobError(f"cannot connect to the Ray at {address!r}: {lines[0]}") from None
    import ray

    try:
        yield
    finally:
        ray.shutdown()  # disconnects; what was running goes on


@contextmanager
def _own_ray() -> Iterator[None]:
    folder = make_folder()
    guardian = start_guardian(folder)
    before = dict(os.environ)
    try:
        set_environment(folder)
        # Ray's workers find this tree wherever the job was started.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        with _silent_core():
            # Where there is one core, encoder and decoders take turns on it.
            start_ray(folder, num_cpus=max(2, own_cores()))
        with ended_with_ray(_LOST):
            yield
    finally:
        if is_lost():
            leave_at_once(JobError(_LOST.format("a part of it")))
        with suppress(Exception):
            import ray

            ray.shutdown()
        guardian.communicate(timeout=30)
        os.environ.clear()
        os.environ.update(before)


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
            raise JobError(_no_room(resources, ray.available_resources()))
        time.sleep(1)
    return resources


def _asked(resources: Resources) -> dict[str, float]:
    return {"CPU": resources.actors * resources.cpus + DECODE_CPUS, "GPU": resources.actors * resources.gpus}


def _fits(resources: Resources, free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0) >= needed for name, needed in _asked(resources).items() if needed)


def _no_room(resources: Resources, free: Mapping[str, float]) -> str:
    asked = _asked(resources)
    gpus = f" and {asked['GPU']:g} GPUs" if asked["GPU"] else ""
    free_gpus = f" and {free.get('GPU', 0):g} GPUs" if asked["GPU"] else ""
    return (
        f"the encoders cannot be placed: {resources.actors} actors and a decoder ask for {asked['CPU']:g} CPUs{gpus}, "
        f"free are {free.get('CPU', 0):g} CPUs{free_gpus}. Ask for fewer with --actors"
    )


@contextmanager
def quiet_data() -> Iterator[None]:
    """Ray Data's settings for datasets that are made meanwhile: no bars and no words of its own on the terminal."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors reach us as exceptions
    context = ray.data.DataContext.get_current()
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,  # wrapped in one of its own, it would lose its cause on the way to us
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
