"""A checkpoint on one device: pixels or texts to unit vectors, by the engine that suits the device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from clipfleet.checkpoint import Checkpoint, find_checkpoint
from clipfleet.engines import choose_engine, resolve_device, settle_device
from clipfleet.errors import CheckpointUnsupported, ClipfleetError, InvalidRequest

Tower = Literal["image", "text"]
_TEXTS_AT_ONCE = 256  # bounds the memory of a forward pass: 0.6 GB at ViT-B/32's full context
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


class EncodedTexts(NamedTuple):
    """Vectors of texts, and what tokenising them said."""

    vectors: np.ndarray  # (n, d) float32
    truncated: list[bool]  # True where the text was longer than the context
    tokens: list[int]  # tokens that the model saw, special ones included


class Encoder:
    """One checkpoint, or one tower of it, ready to encode.

    `checkpoint` is a name as in find_checkpoint or its result; `device` is auto, cpu, cuda or cuda:N;
    `precision` is float32, float16, bfloat16 or int8 (on CPUs, by OpenVINO); `towers` says which halves to load;
    `engine` is auto, torch or openvino; `threads` are those of a CPU, by default all. Vectors are float32 of unit
    length whatever the precision. Raises CheckpointError, DeviceUnavailable or SettingsError.
    """

    def __init__(
        self,
        checkpoint: str | Checkpoint,
        device: str = "auto",
        precision: str = "float32",
        towers: Sequence[Tower] = ("image", "text"),
        *,
        engine: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.device = resolve_device(settle_device(device, engine, precision))
        self.precision = precision
        self.engine = choose_engine(engine, self.device, precision)
        self._threads = threads
        self._tokenizing = threading.Lock()  # a tokenizer keeps padding and truncation as state between its calls
        self.checkpoint = find_checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
        with _quiet_transformers(), _explained(self.checkpoint):
            config: Any = AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)
            self.dimension = _dimension(config)
            self.image_size: int = config.vision_config.image_size
            self.context_length: int = config.text_config.max_position_embeddings
            self._check_pixels()
            self.logit_scale, self.logit_bias = _read_logits(self.checkpoint)
            self._tokenizer: Any = self._load_tokenizer(config) if "text" in towers else None
            self._models = {tower: self._load(tower, config) for tower in towers}

    def _check_pixels(self) -> None:
        height, width = self.checkpoint.pixels.size
        if (height, width) != (self.image_size, self.image_size):
            raise CheckpointUnsupported(
                f"checkpoint {self.checkpoint.name!r} is inconsistent: its image processor makes {height} x {width} "
                f"pixels, its vision tower takes {self.image_size} x {self.image_size}"
            )

    def _load_tokenizer(self, config: Any) -> Any:
        folder, name = self.checkpoint.folder, self.checkpoint.name
        if not any((folder / file).is_file() for file in _TOKENIZER_FILES):  # transformers would make an empty one
            raise CheckpointUnsupported(f"checkpoint {name!r} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) > config.text_config.vocab_size:
            raise CheckpointUnsupported(
                f"checkpoint {name!r} is inconsistent: its tokenizer has {len(tokenizer)} tokens, its text tower "
                f"{config.text_config.vocab_size}"
            )
        if self.checkpoint.model_type == "clip":
            tokenizer.padding_side = "right"  # the causal tower sees padding on the left
            if not isinstance(config.text_config.eos_token_id, int):
                raise CheckpointUnsupported(f"checkpoint {name!r}: config.json gives its text tower no eos_token_id")
        return tokenizer

    def _load(self, tower: Tower, config: Any) -> Any:
        if self.engine == "torch":
            from clipfleet.torch_engine import TorchTower

            return TorchTower(self.checkpoint, config, tower, self.device, self.precision, self._threads)
        from clipfleet.openvino_engine import OpenVinoTower

        return OpenVinoTower(
            self.checkpoint,
            config,
            tower,
            self.precision,
            self._threads,
            lambda count, seed: self._samples(tower, count, seed),
        )

    def _samples(self, tower: Tower, count: int, seed: int) -> list[tuple[np.ndarray, ...]]:
        """Inputs like those to come, `count` items in batches, for calibration (and, with another seed, for its check)."""
        from clipfleet.samples import pictures, texts

        if tower == "image":
            found = pictures(count, self.image_size, seed)
            return [(found[start : start + 8],) for start in range(0, count, 8)]
        words = texts(count, seed)
        return [self._tokenize(words[start : start + 8])[0] for start in range(0, count, 8)]

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Encode uint8 pixels (n, H, W, 3) of the checkpoint's size to unit vectors (n, d) float32.

        A batch that the GPU's memory cannot hold is halved until it fits, with a warning.
        """
        expected = (self.image_size, self.image_size, 3)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != expected:
            raise ValueError(f"uint8 pixels (n, *{expected}) are needed, not {pixels.dtype} {pixels.shape}")
        if len(pixels) == 0:
            return np.zeros((0, self.dimension), np.float32)
        return _unit(self._models["image"](pixels))

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Encode texts to unit vectors (n, d) float32. Texts longer than the context are cut, and say so."""
        vectors = [np.zeros((0, self.dimension), np.float32)]
        truncated: list[bool] = []
        tokens: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            inputs, counts, cut = self._tokenize(list(texts[start : start + _TEXTS_AT_ONCE]), start)
            vectors.append(_unit(self._models["text"](*inputs)))
            tokens += counts
            truncated += cut
        return EncodedTexts(np.concatenate(vectors), truncated, tokens)

    def close(self) -> None:
        """Let go of the weights; the encoder cannot be used afterwards."""
        self._models.clear()
        if self.device != "cpu":
            from clipfleet.torch_engine import free_memory

            free_memory()

    def _tokenize(self, texts: list[str], first: int = 0) -> tuple[tuple[np.ndarray, ...], list[int], list[bool]]:
        """What the tower takes, (n, length) int64 each; how many tokens each text has in it; and whether it was cut.

        `first` is the place of the first text in the caller's list.
        """
        assert self._tokenizer is not None, "the text tower was not loaded"
        for index, text in enumerate(texts):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InvalidRequest("the text holds a lone surrogate, which is no character", index=first + index)
        context = self.context_length
        siglip = self.checkpoint.model_type == "siglip"  # was trained with every text padded to the context
        with self._tokenizing:
            tokens = self._tokenizer(
                texts,
                padding="max_length" if siglip else True,
                truncation=True,
                max_length=context,
                return_tensors="np",
            )
        ids = tokens["input_ids"].astype(np.int64)
        mask = tokens["attention_mask"].astype(np.int64) if "attention_mask" in tokens else np.ones_like(ids)
        # CLIP's causal tower does not see padding, which comes after a text's end.
        return (ids, mask) if siglip else (ids,), mask.sum(1).tolist(), self._truncated(texts, tokens)

    def _truncated(self, texts: list[str], tokens: Any) -> list[bool]:
        if tokens.encodings:
            return [bool(encoding.overflowing) for encoding in tokens.encodings]
        with self._tokenizing:  # one of transformers' slow tokenizers, which do not say
            full = self._tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [len(ids) > self.context_length for ids in full]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _dimension(config: Any) -> int:
    return config.projection_dim if config.model_type == "clip" else config.vision_config.hidden_size


def _read_logits(checkpoint: Checkpoint) -> tuple[float, float | None]:
    """The scale and bias that ranking uses."""
    scale = _read_scalar(checkpoint, "logit_scale")  # stored as its logarithm
    return math.exp(math.log(100) if scale is None else scale), _read_scalar(checkpoint, "logit_bias")


def _read_scalar(checkpoint: Checkpoint, name: str) -> float | None:
    """The value of a tensor with one element; None if there is no such tensor."""
    for path in checkpoint.weight_files():
        with safe_open(path, framework="numpy") as file:
            if name not in file.keys():  # noqa: SIM118  # no mapping
                continue
            if file.get_slice(name).get_dtype() != "BF16":
                return file.get_tensor(name).item()
        with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
            return file.get_tensor(name).item()
    return None


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except ClipfleetError:
        raise
    except Exception as error:  # transformers raises many kinds for files that do not fit together
        if type(error).__name__ == "OutOfMemoryError":  # torch's: the files are well
            raise
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
