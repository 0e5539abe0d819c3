"""The engine for CPUs: OpenVINO, in float32 and in int8.

A tower is converted from the torch module once and kept under the user's cache folder by the checkpoint's content; several
processes that start at once convert it once. No network is needed. int8 is static: activations are calibrated on pictures and
texts, and what that costs is measured against float32 on others, said, and kept with the file.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from clipfleet.checkpoint import Checkpoint
from clipfleet.errors import CheckpointUnsupported, SettingsError
from clipfleet.fingerprint import fingerprint

# openvino and nncf report each import and conversion to their makers unless this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402

# The one of this process. Each has the thread that first compiles with it take signals on a stack of its own, and puts the one
# before back when it goes. Of two, the last to go would put back what the other has freed, and the next signal, such as Ctrl-C,
# would end the process.
_CORE = openvino.Core()
_FORMAT = 1  # of the kept files: a change here makes them anew
LOWEST_MEAN_COSINE = 0.999
CALIBRATION, HELD_OUT = 96, 64  # items
GOOD_ENOUGH = 0.9998
# How strongly nncf moves the range of activations into the weights (SmoothQuant), tried in turn; -1 is not at all. Its default
# of 0.95 cost the embedded checkpoint a cosine of 0.0028 on drawings.
_SMOOTHING = (0.3, -1.0, 0.6)

# Of a layer's widest activations in float32. ViT-B/32 on 2 cores: 22 images/s in pieces of 4 or 8, 20 of 16, 14 of 32, whose
# activations leave the processor's caches between two layers.
_ACTIVATION_BYTES = {"float32": 5 * 2**20, "int8": 20 * 2**20}

Inputs = tuple[np.ndarray, ...]


class OpenVinoTower:
    """One tower on this machine's CPU: uint8 pixels (n, H, W, 3), or token ids and mask (n, length), to vectors (n, d)
    float32. Raises CheckpointUnsupported if int8 would cost too much."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        tower: str,
        precision: str,
        threads: int | None,
        samples: Callable[[int, int], Sequence[Inputs]],
    ) -> None:
        file = _exported(checkpoint, config, tower, precision, samples)
        self._request = _compile(_CORE.read_model(file), threads).create_infer_request()
        self._lock = threading.Lock()
        part = config.vision_config if tower == "image" else config.text_config
        patches = (part.image_size // part.patch_size) ** 2 + 1 if tower == "image" else 0
        # int8 kernels are quicker on multiples of 8 tokens, float32 ones are not. CLIP's causal tower does not see padding.
        self._lengthen = tower == "text" and precision == "int8" and config.model_type == "clip"
        self._context = config.text_config.max_position_embeddings
        self._positions, self._widest, self._budget = patches, part.intermediate_size, _ACTIVATION_BYTES[precision]

    def _lengthened(self, ids: np.ndarray) -> np.ndarray:
        length = min(self._context, -(-ids.shape[1] // 8) * 8)
        return np.pad(ids, ((0, 0), (0, length - ids.shape[1])))

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        if self._lengthen:
            arrays = (self._lengthened(arrays[0]),)
        count = len(arrays[0])
        positions = self._positions or arrays[0].shape[1]
        at_once = max(1, self._budget // (4 * positions * self._widest))
        pieces = -(-count // at_once)
        edges = [count * number // pieces for number in range(pieces + 1)]  # of nearly the same size
        with self._lock:
            found = [
                _infer(self._request, tuple(array[start:stop] for array in arrays)) for start, stop in pairwise(edges)
            ]
        return found[0] if pieces == 1 else np.concatenate(found)


def _infer(request: Any, arrays: Inputs) -> np.ndarray:
    contiguous = [np.require(array, requirements=["C", "W"]) for array in arrays]
    return np.array(request.infer(contiguous, share_inputs=True)[0])


def _compile(model: Any, threads: int | None) -> Any:
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,  # one batch at a time on all threads
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bfloat16, OpenVINO would use it unasked
        "ENABLE_CPU_PINNING": False,  # several replicas would pin themselves to the same cores
    }
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return _CORE.compile_model(model, "CPU", options)


def cache_folder() -> Path:
    """Where converted checkpoints are kept: clipfleet/engines under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "clipfleet" / "engines"


def _exported(
    checkpoint: Checkpoint,
    config: Any,
    tower: str,
    precision: str,
    samples: Callable[[int, int], Sequence[Inputs]],
) -> Path:
    """The converted tower's file; converts it if nobody has yet."""
    version = openvino.get_version().split("-")[0]
    name = f"{fingerprint(checkpoint)}-{tower}-{precision}-openvino{version}-{_FORMAT}"
    base = _writable_folder(name)
    done = base / name
    if not done.is_dir():
        with _locked(base / f"{name}.lock"):
            if not done.is_dir():
                with tempfile.TemporaryDirectory(dir=base, prefix=".making-") as making:
                    _export(checkpoint, config, tower, precision, samples, Path(making))
                    shutil.copytree(making, f"{making}-done")
                os.rename(f"{making}-done", done)
    return done / "model.xml"


def _writable_folder(name: str) -> Path:
    """The cache folder if it holds `name` or can be written, otherwise one of this user's alone among temporary files."""
    try:
        base = cache_folder()
        if (base / name).is_dir():
            return base
        base.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=base).close()
        return base
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        base = Path(tempfile.gettempdir()) / f"clipfleet-engines-{os.getuid()}"
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != os.getuid():
            raise SettingsError(
                f"{base} belongs to somebody else; name a folder for caches: XDG_CACHE_HOME=..."
            ) from error
        logger.warning("the cache folder cannot be written ({}); converted checkpoints are kept in {}", error, base)
        return base


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a lock ends with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _export(
    checkpoint: Checkpoint,
    config: Any,
    tower: str,
    precision: str,
    samples: Callable[[int, int], Sequence[Inputs]],
    folder: Path,
) -> None:
    import torch

    from clipfleet.torch_engine import load_tower

    started = time.monotonic()
    module = load_tower(checkpoint, config, tower, torch.float32)
    calibration, held_out = samples(CALIBRATION, 1), samples(HELD_OUT, 2)
    example = tuple(torch.from_numpy(array) for array in held_out[0])
    shapes = [openvino.PartialShape([-1, *(array.shape[1:] if tower == "image" else (-1,))]) for array in held_out[0]]
    with torch.no_grad():
        expected = np.concatenate([module(*map(torch.from_numpy, inputs)).numpy() for inputs in held_out])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.trace", DeprecationWarning)  # openvino's own way in
            model = openvino.convert_model(module, example_input=example, input=shapes)
    report: dict[str, Any] = {"checkpoint": checkpoint.name, "tower": tower, "precision": precision}
    if precision == "int8":
        model, report["smoothing"], cosines = _quantized(model, calibration, held_out, expected)
        report |= {"cosine to float32, mean": float(cosines.mean()), "lowest": float(cosines.min())}
        logger.info(
            "{}: {} tower in int8, cosine to float32 on {} samples: mean {:.5f}, lowest {:.5f}",
            checkpoint.name, tower, len(cosines), cosines.mean(), cosines.min(),
        )  # fmt: skip
        if cosines.mean() < LOWEST_MEAN_COSINE:
            raise CheckpointUnsupported(
                f"checkpoint {checkpoint.name!r} loses too much in int8: the cosine to float32 of its {tower} tower is "
                f"{cosines.mean():.4f} in the mean, {LOWEST_MEAN_COSINE} is asked for. Use precision float32"
            )
    else:
        difference = np.abs(_unit(_outputs(model, held_out)) - _unit(expected)).max()
        report["largest difference to torch"] = float(difference)
        if difference > 1e-5:
            raise CheckpointUnsupported(
                f"checkpoint {checkpoint.name!r}: OpenVINO's vectors differ from torch's by {difference:.1e}. Use engine torch"
            )
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    logger.info("converted the {} tower of {} in {:.1f} s", tower, checkpoint.name, time.monotonic() - started)


def _quantized(
    model: Any, calibration: Sequence[Inputs], held_out: Sequence[Inputs], expected: np.ndarray
) -> tuple[Any, float, np.ndarray]:
    """The model in int8, with the first smoothing that is good enough or else the best one; that; its cosines."""
    import logging

    import nncf

    nncf.set_log_level(logging.ERROR)
    # The convolution that makes the patches: in int8 it costs 0.002 of cosine and saves 2% of the time.
    patches = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "Convolution"]
    best: tuple[Any, float, np.ndarray] | None = None
    for strength in _SMOOTHING:
        with redirect_stdout(io.StringIO()):  # its progress bars know no other way to be off
            quantized = nncf.quantize(
                model,
                nncf.Dataset([tuple(inputs) if len(inputs) > 1 else next(iter(inputs)) for inputs in calibration]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
                ignored_scope=nncf.IgnoredScope(names=patches),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=strength)
                ),
            )
        cosines = (_unit(_outputs(quantized, held_out)) * _unit(expected)).sum(1)
        if best is None or cosines.mean() > best[2].mean():
            best = quantized, strength, cosines
        if best[2].mean() >= GOOD_ENOUGH:
            break
    assert best is not None
    return best


def _outputs(model: Any, inputs: Sequence[Inputs]) -> np.ndarray:
    request = _compile(model, None).create_infer_request()
    return np.concatenate([_infer(request, arrays) for arrays in inputs])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
