"""What is done with vectors once they exist: similarity, ranking, wire forms. numpy alone."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Literal

import numpy as np

DType = Literal["float32", "float16"]


@dataclass(frozen=True)
class Ranked:
    """One candidate's place in a ranking."""

    index: int
    score: float  # cosine, -1..1
    probability: float  # 0..1


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two vectors of shape (d,), -1..1. They need not be of unit length; a zero vector gives 0."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two vectors of one shape (d,) are needed, not {first.shape} and {second.shape}")
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(first @ second / length, -1.0, 1.0)) if length else 0.0


def rank(
    query: np.ndarray,
    candidates: np.ndarray,
    *,
    logit_scale: float = 100.0,
    logit_bias: float | None = None,
) -> list[Ranked]:
    """Rank candidates (n, d) by their cosine to the query (d,), best first; equal scores keep their order.

    Probabilities follow the model's own scale: without a bias (CLIP) a softmax over the candidates of
    cosine x logit_scale; with a bias (SigLIP) the sigmoid of cosine x logit_scale + logit_bias, each on its
    own. 100 is the scale that CLIP's training converges to (Radford et al. 2021, section 2.5).
    """
    query = np.asarray(query, np.float64)
    candidates = np.asarray(candidates, np.float64)
    if query.ndim != 1 or candidates.ndim != 2 or candidates.shape[1:] != query.shape:
        raise ValueError(f"query (d,) and candidates (n, d) are needed, not {query.shape} and {candidates.shape}")
    lengths = np.linalg.norm(candidates, axis=1) * np.linalg.norm(query)
    scores = np.clip(candidates @ query / np.where(lengths, lengths, 1.0), -1.0, 1.0)  # (n,)
    logits = scores * logit_scale + (logit_bias or 0.0)
    probabilities = _softmax(logits) if logit_bias is None else _sigmoid(logits)
    order = np.argsort(-scores, kind="stable")
    return [Ranked(int(i), float(scores[i]), float(probabilities[i])) for i in order]


def _softmax(logits: np.ndarray) -> np.ndarray:
    if not len(logits):
        return logits
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))  # 1 / (1 + e^-x) without overflow


def to_base64(vector: np.ndarray, dtype: DType = "float32") -> str:
    """A vector (d,) as base64 over its little-endian bytes, OpenAI's compact form."""
    return base64.b64encode(_little_endian(vector, dtype).tobytes()).decode("ascii")


def from_base64(text: str, dtype: DType = "float32") -> np.ndarray:
    """The vector (d,) behind `to_base64`."""
    return np.frombuffer(base64.b64decode(text, validate=True), np.dtype(dtype).newbyteorder("<")).astype(dtype)


def to_npy(vectors: np.ndarray, dtype: DType = "float32") -> bytes:
    """Vectors (n, d) as the bytes of one .npy file."""
    file = io.BytesIO()
    np.save(file, _little_endian(vectors, dtype), allow_pickle=False)
    return file.getvalue()


def _little_endian(array: np.ndarray, dtype: DType) -> np.ndarray:
    return np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
