"""Which engine runs a tower, and on what. Nothing is imported for it where there is no NVIDIA driver."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

from clipfleet.errors import SettingsError

Precision = Literal["float32", "float16", "bfloat16", "int8"]
Engine = Literal["auto", "torch", "openvino"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENGINES: tuple[str, ...] = get_args(Engine)

NVIDIA_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of Linux and of its subsystem in Windows


def choose_engine(engine: str, device: str, precision: str) -> str:
    """The engine for a device (cpu, cuda or cuda:N) and a precision: torch, or openvino where it is installed and can.

    Raises SettingsError for what does not go together or is not installed.
    """
    check_engine(engine, device, precision)
    able = device == "cpu" and precision in ("float32", "int8")
    present = importlib.util.find_spec("openvino") is not None
    if not present and (engine == "openvino" or precision == "int8"):
        raise SettingsError("engine openvino is not installed: pip install 'clipfleet[openvino]'")
    return "openvino" if able and present and engine != "torch" else "torch"


def settle_device(device: str, engine: str, precision: str) -> str:
    """`auto` where the engine or the precision is one of CPUs alone means cpu, whatever GPUs there are."""
    return "cpu" if device == "auto" and (precision == "int8" or engine == "openvino") else device


def check_engine(engine: str, device: str, precision: str) -> None:
    """Raise SettingsError for what does not go together, whatever is installed. Device `auto` may turn out to be either."""
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}")
    if engine not in ENGINES:
        raise SettingsError(f"engine {engine!r} is unknown; known are {', '.join(ENGINES)}")
    able = device in ("cpu", "auto") and precision in ("float32", "int8")
    if engine == "openvino" and not able:
        raise SettingsError(
            f"engine openvino runs float32 and int8 on CPUs, not {precision} on {device}; use engine torch"
        )
    if precision == "int8" and (engine == "torch" or not able):
        raise SettingsError(f"precision int8 runs on CPUs by engine openvino, not on {device} by engine {engine}")


def resolve_device(device: str) -> str:
    """Turn auto, cpu, cuda or cuda:N into cpu, cuda or cuda:N. Raises DeviceUnavailable or SettingsError."""
    if device == "cpu" or (device == "auto" and not any(Path(path).exists() for path in NVIDIA_DRIVERS)):
        return "cpu"  # without torch, which takes a second to import
    from clipfleet.torch_engine import resolve_device as of_torch

    return of_torch(device)
