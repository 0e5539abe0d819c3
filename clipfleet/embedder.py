"""CLIP vectors in process: `CLIPEmbedder`, and the legacy `CLIPModel`."""

from __future__ import annotations

import asyncio
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from types import TracebackType
from typing import TypeVar

import numpy as np
from loguru import logger
from PIL import Image
from tqdm.auto import tqdm

from clipfleet import threads
from clipfleet.encoder import Encoder
from clipfleet.errors import ClipfleetError, Closed, ImageError, ImageNotFound, SettingsError
from clipfleet.image_files import ImageLimits
from clipfleet.images import decode
from clipfleet.vectors import cosine

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
_BATCHES_AHEAD = 2  # with one, cores idle while the last image of a batch decodes
T = TypeVar("T")


class CLIPEmbedder:
    """Embeds image files and texts with one checkpoint on one device.

    `model_name` is a hub id (optionally `id@revision`), a local folder, or `tiny` (embedded, works offline);
    `device` is auto, cpu, cuda or cuda:N. Vectors are float32 of unit length, shape (d,). Images decode on a
    pool of threads and the model runs on a thread of its own, so async methods never block the event loop.
    Use it as a context manager, or call close(), to release the model early; otherwise that happens when
    the embedder is garbage-collected or the interpreter exits.

    `precision` is float32, float16 or bfloat16, or int8 on a CPU, which is several times faster and less exact
    (docs/vectors.md); `engine` is torch, openvino, or auto: OpenVINO on CPUs where it is installed. `reduced_jpeg` decodes
    large JPEGs at a fraction of their size, faster and less exact likewise.

    Raises CheckpointError, DeviceUnavailable or SettingsError.
    """

    def __init__(
        self,
        model_name: str = DEFAULT_MODEL,
        device: str = "auto",
        *,
        precision: str = "float32",
        engine: str = "auto",
        reduced_jpeg: bool = False,
    ) -> None:
        logger.info("Loading CLIP checkpoint {} (device {})", model_name, device)
        try:
            self._encoder = Encoder(model_name, device, precision, engine=engine)
        except ClipfleetError as error:
            logger.error("{}", error)
            raise
        self._limits = ImageLimits(reduced_jpeg=reduced_jpeg)
        self.model_name = model_name
        self.device = str(self._encoder.device)
        self._decoders = ThreadPoolExecutor(threads.cores(), thread_name_prefix="clipfleet-decode")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="clipfleet-model")
        self._release = weakref.finalize(self, _release, self._encoder, self._decoders, self._model_thread)
        logger.success("{} is ready on {}: {} dimensions", model_name, self.device, self._encoder.dimension)

    async def generate_embedding(self, image_path: str | os.PathLike[str]) -> np.ndarray | None:
        """Embed one image file: shape (d,) float32 of unit length, or None if it does not decode.

        Raises FileNotFoundError if there is no such file.
        """
        pixels = await self._run(self._decoders, lambda: self._decode(image_path))
        if isinstance(pixels, ImageNotFound):
            raise pixels
        if isinstance(pixels, ImageError):
            return None
        vectors = await self._run(self._model_thread, lambda: self._encoder.encode_pixels(pixels[None]))
        logger.debug("Embedded {}", image_path)
        return vectors[0]

    async def generate_embeddings_batch(
        self,
        image_paths: Sequence[str | os.PathLike[str]],
        batch_size: int = 32,
        show_progress: bool = True,
    ) -> list[np.ndarray | None]:
        """Embed image files in order, `batch_size` at a time; None stands for a missing or undecodable one.

        The next two batches decode while the model works on this one, so three batches are held at a time.
        """
        if batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, not {batch_size}")
        results: list[np.ndarray | None] = []
        chunks = iter([image_paths[start : start + batch_size] for start in range(0, len(image_paths), batch_size)])
        ahead = deque(self._decode_all(chunk) for chunk in islice(chunks, _BATCHES_AHEAD))
        with tqdm(total=len(image_paths), desc="Embedding", unit="image", disable=not show_progress) as bar:
            try:
                while ahead:
                    decoded = await ahead[0]
                    ahead.popleft()
                    ahead.extend(self._decode_all(chunk) for chunk in islice(chunks, 1))
                    results += await self._run(self._model_thread, partial(self._encode, decoded))
                    bar.update(len(decoded))
            finally:
                for decoding in ahead:
                    decoding.cancel()  # there is none unless the loop was left early
        failed = sum(vector is None for vector in results)
        logger.info("Embedded {} of {} images, {} failed", len(results) - failed, len(results), failed)
        return results

    def encode_text(self, text: str | list[str]) -> np.ndarray:
        """Embed a text, shape (d,), or a list of n texts, shape (n, d); float32 of unit length.

        Texts longer than the checkpoint's context are cut, with a warning.
        """
        self._check_open()
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(item, str) for item in texts):
            raise TypeError("encode_text takes a string or a list of strings")
        encoded = self._model_thread.submit(self._encoder.encode_texts, texts).result()
        if any(encoded.truncated):
            logger.warning(
                "{} of {} texts were cut at {} tokens", sum(encoded.truncated), len(texts), self._encoder.context_length
            )
        return encoded.vectors[0] if isinstance(text, str) else encoded.vectors

    def compute_similarity(self, embedding1: np.ndarray, embedding2: np.ndarray) -> float:
        """Cosine of two vectors of shape (d,), -1..1."""
        return cosine(embedding1, embedding2)

    def get_embedding_dimension(self) -> int:
        """The d of every vector, 512 for ViT-B/32."""
        return self._encoder.dimension

    def close(self) -> None:
        """Release the model and the threads. Closing twice is harmless; any other use afterwards raises Closed."""
        self._release()

    def __enter__(self) -> CLIPEmbedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CLIPEmbedder({self.model_name!r}, device={self.device!r})"

    def _check_open(self) -> None:
        if not self._release.alive:
            raise Closed(f"{self!r} was closed; make a new one")

    async def _run(self, pool: Executor, work: Callable[[], T]) -> T:
        self._check_open()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                self._check_open()  # nobody cancelled the caller: close() has dropped its work
            raise

    def _decode_all(self, paths: Sequence[str | os.PathLike[str]]) -> asyncio.Future[list[np.ndarray | ImageError]]:
        return asyncio.gather(*(self._run(self._decoders, lambda path=path: self._decode(path)) for path in paths))

    def _decode(self, path: str | os.PathLike[str]) -> np.ndarray | ImageError:
        try:
            return decode(path, self._encoder.checkpoint.pixels, self._limits).pixels  # (H, W, 3) uint8
        except ImageError as error:
            logger.warning("Skipping {}: {}", path, error)
            return error

    def _encode(self, decoded: list[np.ndarray | ImageError]) -> list[np.ndarray | None]:
        good = [pixels for pixels in decoded if isinstance(pixels, np.ndarray)]
        vectors = iter(self._encoder.encode_pixels(np.stack(good)) if good else ())
        return [next(vectors) if isinstance(pixels, np.ndarray) else None for pixels in decoded]


def _release(encoder: Encoder, *pools: ThreadPoolExecutor) -> None:
    for pool in pools:
        # The last reference may die on one of these threads, so nothing here may wait for them.
        pool.shutdown(wait=False, cancel_futures=True)
    encoder.close()


class CLIPModel:
    """Deprecated: the class that came before CLIPEmbedder, for code that still calls it."""

    def __init__(self, device: str = "auto", model_name: str = DEFAULT_MODEL) -> None:
        warnings.warn("CLIPModel is deprecated; use CLIPEmbedder", DeprecationWarning, stacklevel=2)
        self._encoder = Encoder(model_name, device)

    def encode_image(self, image: Image.Image) -> np.ndarray:
        """Embed one PIL image: shape (d,) float32 of unit length. Raises an ImageError if it does not decode."""
        return self._encoder.encode_pixels(decode(image, self._encoder.checkpoint.pixels).pixels[None])[0]

    def encode_text(self, text: str) -> np.ndarray:
        """Embed one text: shape (d,) float32 of unit length."""
        return self._encoder.encode_texts([text]).vectors[0]
