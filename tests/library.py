"""The library that vectors from elsewhere are compared with."""

from __future__ import annotations

import numpy as np

from clipfleet.encoder import Encoder
from clipfleet.images import decode


class Library:
    """A checkpoint in this process."""

    def __init__(self, checkpoint: str = "tiny") -> None:
        self._encoder = Encoder(checkpoint, "cpu")

    def images(self, files: list[bytes]) -> np.ndarray:
        """Vectors (n, d) of encoded images."""
        return self._encoder.encode_pixels(
            np.stack([decode(data, self._encoder.checkpoint.pixels)[0] for data in files])
        )

    def texts(self, texts: list[str]) -> np.ndarray:
        """Vectors (n, d) of texts."""
        return self._encoder.encode_texts(texts).vectors
