"""A checkpoint on one device: pixels or texts to unit vectors."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from loguru import logger
from transformers import AutoConfig, AutoTokenizer

from clipfleet.checkpoint import Checkpoint, find_checkpoint
from clipfleet.errors import CheckpointUnsupported, ClipfleetError, DeviceUnavailable, InvalidRequest, SettingsError
from clipfleet.towers import ACTIVATIONS, TOWERS, Weights

Tower = Literal["image", "text"]
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class EncodedTexts(NamedTuple):
    """Vectors of texts, and what tokenising them said."""

    vectors: np.ndarray  # (n, d) float32
    truncated: list[bool]  # True where the text was longer than the context
    tokens: list[int]  # tokens that the model saw, special ones included


class Encoder:
    """One checkpoint, or one tower of it, ready to encode.

    `checkpoint` is a name as in find_checkpoint or its result; `device` is auto, cpu, cuda or cuda:N;
    `precision` is float32, float16 or bfloat16; `towers` says which halves to load. Vectors are float32
    of unit length whatever the precision. Raises CheckpointError, DeviceUnavailable or SettingsError.
    """

    def __init__(
        self,
        checkpoint: str | Checkpoint,
        device: str = "auto",
        precision: str = "float32",
        towers: Sequence[Tower] = ("image", "text"),
    ) -> None:
        self.device = resolve_device(device)
        self.precision = precision
        if precision not in PRECISIONS:
            raise SettingsError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}")
        self.checkpoint = find_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        with _quiet_transformers(), _explained(self.checkpoint):
            config: Any = AutoConfig.from_pretrained(self.checkpoint.folder)
            self.dimension = _dimension(config)
            self.image_size: int = config.vision_config.image_size
            self.context_length: int = config.text_config.max_position_embeddings
            self._check_pixels()
            self.logit_scale, self.logit_bias = _read_logits(self.checkpoint)
            self._models = {tower: self._load(tower, config) for tower in towers}
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.checkpoint.folder) if "text" in towers else None
            if self._tokenizer and self.checkpoint.model_type == "clip":
                self._tokenizer.padding_side = "right"  # its causal tower sees padding on the left
        self._tokenizing = threading.Lock()  # a tokenizer keeps padding and truncation as state between its calls
        if self.device.type == "cuda" and precision == "float32":
            torch.backends.cudnn.allow_tf32 = False  # the patch convolution would lose 1e-3 otherwise
            torch.backends.cuda.matmul.allow_tf32 = False
        self._mean = torch.tensor(self.checkpoint.pixels.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.checkpoint.pixels.std, device=self.device).view(1, 3, 1, 1)

    def _check_pixels(self) -> None:
        height, width = self.checkpoint.pixels.size
        if (height, width) != (self.image_size, self.image_size):
            raise CheckpointUnsupported(
                f"checkpoint {self.checkpoint.name!r} is inconsistent: its image processor makes {height} x {width} "
                f"pixels, its vision tower takes {self.image_size} x {self.image_size}"
            )

    def _load(self, tower: Tower, config: Any) -> torch.nn.Module:
        act = (config.vision_config if tower == "image" else config.text_config).hidden_act
        if act not in ACTIVATIONS:
            raise CheckpointUnsupported(
                f"checkpoint {self.checkpoint.name!r}: activation {act!r} of its {tower} tower is not supported; "
                f"supported are {', '.join(ACTIVATIONS)}"
            )
        with Weights(self.checkpoint, PRECISIONS[self.precision]) as weights:
            model = TOWERS[config.model_type, tower](weights, config)
        if weights.wrong:
            raise CheckpointUnsupported(
                f"checkpoint {self.checkpoint.name!r}: weights of its {tower} tower are missing or have another shape "
                f"than config.json says: {', '.join(weights.wrong[:3])}{', ...' if weights.wrong[3:] else ''}"
            )
        return model.eval().to(self.device)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 pixels (n, H, W, 3) of the checkpoint's size to unit vectors (n, d) float32.

        A batch that the GPU's memory cannot hold is halved until it fits, with a warning.
        """
        expected = (self.image_size, self.image_size, 3)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            raise ValueError(f"uint8 pixels (n, *{expected}) are needed, not {pixels.dtype} {pixels.shape}")
        if len(pixels) == 0:
            return np.zeros((0, self.dimension), np.float32)
        return self._halving(self._forward_pixels, pixels)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts to unit vectors (n, d) float32. Texts longer than the context are cut, and say so."""
        if not texts:
            return EncodedTexts(np.zeros((0, self.dimension), np.float32), [], [])
        tokens, truncated = self._tokenize(list(texts))
        ids = tokens["input_ids"]
        counts = tokens["attention_mask"].sum(1).tolist() if "attention_mask" in tokens else [ids.shape[1]] * len(ids)
        rows = np.arange(len(texts))
        vectors = self._halving(lambda part: self._forward_tokens({k: v[part] for k, v in tokens.items()}), rows)
        return EncodedTexts(vectors, truncated, counts)

    def close(self) -> None:
        """Let go of the weights; the encoder cannot be used afterwards."""
        self._models.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, torch.Tensor], list[bool]]:
        assert self._tokenizer is not None, "the text tower was not loaded"
        for index, text in enumerate(texts):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InvalidRequest("the text holds a lone surrogate, which is no character", index=index)
        context = self.context_length
        # SigLIP was trained with every text padded to the context; CLIP's causal tower does not see what comes after the end.
        padding = "max_length" if self.checkpoint.model_type == "siglip" else True
        with self._tokenizing:
            full = self._tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
            tokens = self._tokenizer(texts, padding=padding, truncation=True, max_length=context, return_tensors="pt")
        return dict(tokens), [len(ids) > context for ids in full]

    def _halving(self, forward: Any, batch: np.ndarray) -> np.ndarray:
        try:
            return forward(batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        half = len(batch) // 2
        logger.warning("{} ran out of memory at batch size {}; going on with {}", self.device, len(batch), half)
        torch.cuda.empty_cache()
        return np.concatenate([self._halving(forward, batch[:half]), self._halving(forward, batch[half:])])

    @torch.inference_mode()
    def _forward_pixels(self, pixels: np.ndarray) -> np.ndarray:
        pixels = np.require(pixels, requirements=["C", "W"])  # torch warns of read-only arrays, such as Ray's
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)  # (n, H, W, 3) uint8
        batch = batch.permute(0, 3, 1, 2).float() * self.checkpoint.pixels.rescale  # (n, 3, H, W) float32, 0..1
        batch = (batch - self._mean) / self._std
        return _unit(self._models["image"](batch.to(PRECISIONS[self.precision])))

    @torch.inference_mode()
    def _forward_tokens(self, tokens: dict[str, torch.Tensor]) -> np.ndarray:
        mask = tokens.get("attention_mask")
        return _unit(
            self._models["text"](tokens["input_ids"].to(self.device), None if mask is None else mask.to(self.device))
        )


def set_threads(count: int) -> None:
    """Let torch use `count` threads in this process. Ray would give a replica one a CPU that it reserves."""
    torch.set_num_threads(count)


def resolve_device(device: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device of this machine. Raises DeviceUnavailable or SettingsError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return resolved


def _unit(vectors: torch.Tensor) -> np.ndarray:
    vectors = vectors.float()  # (n, d)
    return (vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()


def _dimension(config: Any) -> int:
    return config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size


def _read_logits(checkpoint: Checkpoint) -> tuple[float, float | None]:
    """The scale and bias that ranking uses."""
    with Weights(checkpoint) as weights:
        scale = weights.scalar("logit_scale")  # stored as its logarithm
        return math.exp(math.log(100) if scale is None else scale), weights.scalar("logit_bias")


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (ClipfleetError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for files that do not fit together
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointUnsupported(f"checkpoint {checkpoint.name!r} cannot be loaded: {reason}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; problems arrive as errors."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
