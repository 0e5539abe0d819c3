"""The engine that runs everywhere: torch, on a CPU or on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import nn

from clipfleet.checkpoint import Checkpoint, PixelSpec
from clipfleet.errors import CheckpointUnsupported, DeviceUnavailable, SettingsError
from clipfleet.towers import ACTIVATIONS, TOWERS, Weights

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchTower:
    """One tower on one device: uint8 pixels (n, H, W, 3), or token ids and mask (n, length), to vectors (n, d) float32.

    A batch that the GPU's memory cannot hold is halved until it fits, with a warning.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: Any, tower: str, device: str, precision: str, threads: int | None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._device = torch.device(device)
        if self._device.type == "cuda" and precision == "float32":
            torch.backends.cudnn.allow_tf32 = False  # the patch convolution would lose 1e-3 otherwise
            torch.backends.cuda.matmul.allow_tf32 = False
        self.module = load_tower(checkpoint, config, tower, PRECISIONS[precision]).to(self._device)

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        try:
            return self._run(arrays)
        except torch.cuda.OutOfMemoryError:
            size = len(arrays[0])
            if size == 1:
                raise
        half = size // 2
        logger.warning("{} ran out of memory at batch size {}; going on with {}", self._device, size, half)
        torch.cuda.empty_cache()
        return np.concatenate([self(*(a[:half] for a in arrays)), self(*(a[half:] for a in arrays))])

    @torch.inference_mode()
    def _run(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        # torch warns of read-only arrays, such as Ray's
        inputs = [torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays]
        if self._device.type == "cuda":
            inputs = [tensor.pin_memory() for tensor in inputs]  # copied to the GPU without waiting for it
        output = self.module(*(tensor.to(self._device, non_blocking=True) for tensor in inputs))
        return output.float().cpu().numpy()


class PixelTower(nn.Module):
    """An image tower from uint8 pixels (n, H, W, 3): they are normalised where the model runs."""

    def __init__(self, tower: nn.Module, pixels: PixelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self._rescale, self._dtype = tower, pixels.rescale, dtype
        self.mean = nn.Buffer(torch.tensor(pixels.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(pixels.std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).float() * self._rescale  # (n, 3, H, W) float32, 0..1
        return self.tower(((x - self.mean) / self.std).to(self._dtype))


def load_tower(checkpoint: Checkpoint, config: Any, tower: str, dtype: torch.dtype) -> nn.Module:
    """The image tower of a checkpoint with its normalisation, or the text tower. Raises CheckpointUnsupported."""
    act = (config.vision_config if tower == "image" else config.text_config).hidden_act
    if act not in ACTIVATIONS:
        raise CheckpointUnsupported(
            f"checkpoint {checkpoint.name!r}: activation {act!r} of its {tower} tower is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    with Weights(checkpoint, dtype) as weights:
        model = TOWERS[config.model_type, tower](weights, config)
    if weights.wrong:
        raise CheckpointUnsupported(
            f"checkpoint {checkpoint.name!r}: weights of its {tower} tower are missing or have another shape "
            f"than config.json says: {', '.join(weights.wrong[:3])}{', ...' if weights.wrong[3:] else ''}"
        )
    return (PixelTower(model, checkpoint.pixels, dtype) if tower == "image" else model).eval()


def free_memory() -> None:
    """Give the GPU's memory that nothing holds any more back to others."""
    torch.cuda.empty_cache()


def device_count() -> int:
    """CUDA devices of this machine."""
    return torch.cuda.device_count()


def resolve_device(device: str) -> str:
    """Turn auto, cpu, cuda or cuda:N into a device of this machine. Raises DeviceUnavailable or SettingsError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device {device!r} is unknown; known are auto, cpu, cuda and cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(
            f"device {device!r} is not available: torch finds {torch.cuda.device_count()} CUDA devices here. "
            "Use device 'auto' to take a GPU where there is one and the CPU otherwise",
            device=device,
        )
    return device
