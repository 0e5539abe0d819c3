"""How much of what a checkpoint needs on this machine: rates measured here, and what follows from them.

measure(...) -> Rates            decode and encode, in this process
Plan(...)                        decoders an encoder, cost of a million images, a config file
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipfleet.encoder import Encoder
from clipfleet.errors import ImageError, SettingsError
from clipfleet.image_files import SUFFIXES, ImageLimits, read_file
from clipfleet.images import decode
from clipfleet.samples import jpegs, texts
from clipfleet.threads import of_decoder, of_planned_encoder

BATCHES = {"cpu": (1, 4, 8, 16, 32), "cuda": (1, 8, 32, 64, 128, 256)}
_SECONDS = 1.0  # a measurement goes on for at least this long
_GOOD = 0.95  # of the best rate; a smaller batch that reaches it answers sooner


@dataclass(frozen=True)
class Rates:
    """What this machine does with this checkpoint. `encode` and `texts` are items a second by batch size, of one encoder."""

    decode_s: float  # of one core, for an image
    image_bytes: float  # in the mean
    failed: int  # of the sample
    encode: dict[int, float]
    texts: dict[int, float]
    device: str
    engine: str
    threads: int  # of an encoder on a CPU


def measure(
    source: Path | None,
    model: str,
    *,
    device: str,
    precision: str,
    engine: str,
    reduced_jpeg: bool,
    threads: int | None,
    most: int,
    say: Callable[[str], object],
) -> Rates:
    """Measure on up to `most` images of the folder `source`, or on drawn ones. Raises SettingsError or CheckpointError."""
    own_threads = threads or of_planned_encoder()
    say(f"loading {model}")
    encoder = Encoder(model, device, precision, engine=engine, threads=own_threads)
    files = _sample(source, most) if source else []
    limits = ImageLimits(reduced_jpeg=reduced_jpeg)
    say(f"decoding {len(files)} images on one core" if files else "no SOURCE: decoding is measured on drawn JPEGs")
    images = [read_file(file) for file in files] or jpegs(8, 1024, 7)
    pixels, failed, decode_s = _decode_all(images, encoder, limits)
    stack = np.stack(pixels)
    batches = BATCHES[encoder.device.partition(":")[0]]
    say(f"encoding images and texts in batches of {', '.join(map(str, batches))}")
    rates = {size: _rate(lambda size=size: encoder.encode_pixels(_cycled(stack, size)), size) for size in batches}
    words = texts(max(batches), 7)
    text_rates = {size: _rate(lambda size=size: encoder.encode_texts(words[:size]), size) for size in batches}
    size = float(np.mean([len(image) for image in images]))
    result = Rates(decode_s, size, failed, rates, text_rates, encoder.device, encoder.engine, own_threads)
    encoder.close()
    return result


def _sample(source: Path, most: int) -> list[Path]:
    if not source.is_dir():
        raise SettingsError(f"SOURCE must be a folder of images, and {str(source)!r} is none")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise SettingsError(f"{str(source)!r} holds no images")
    return [files[int(number)] for number in np.linspace(0, len(files) - 1, min(most, len(files)))]


def _decode_all(images: Sequence[bytes], encoder: Encoder, limits: ImageLimits) -> tuple[list[np.ndarray], int, float]:
    pixels: list[np.ndarray] = []
    failed = done = 0
    started = time.perf_counter()
    while done < len(images) or time.perf_counter() - started < _SECONDS:
        try:
            picture = decode(images[done % len(images)], encoder.checkpoint.pixels, limits)
            if done < len(images):
                pixels.append(picture.pixels)
        except ImageError:
            failed += done < len(images)
        done += 1
    if not pixels:
        raise SettingsError(f"none of the {len(images)} images of the sample decodes")
    return pixels, failed, (time.perf_counter() - started) / done


def _cycled(stack: np.ndarray, size: int) -> np.ndarray:
    return stack[np.arange(size) % len(stack)]


def _rate(work: Callable[[], object], items: int) -> float:
    work()  # the first one allocates
    started, runs = time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - started < _SECONDS:
        work()
        runs += 1
    return runs * items / (time.perf_counter() - started)


def best_batch(rates: dict[int, float]) -> int:
    """The smallest batch size that comes close to the best rate."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= _GOOD * best)


@dataclass(frozen=True)
class Prices:
    """Of an hour; 0 where unknown."""

    core: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the rates mean. `transport` is requests a second that one ingress carries without a model, `transport_s` seconds
    of a core for one of them."""

    model: str
    precision: str
    reduced_jpeg: bool
    rates: Rates
    transport: float
    transport_s: float
    cores: int
    gpus: int
    prices: Prices

    @property
    def on_gpu(self) -> bool:
        return self.rates.device.startswith("cuda")

    @property
    def batch(self) -> int:
        return best_batch(self.rates.encode)

    @property
    def encode_rate(self) -> float:
        return self.rates.encode[self.batch]

    @property
    def decoders(self) -> float:
        """Cores that decode as fast as one encoder encodes."""
        return self.encode_rate * self.rates.decode_s

    @property
    def cores_per_encoder(self) -> float:
        """All cores that one encoder keeps busy, its own included."""
        return self.decoders + self.encode_rate * self.transport_s + (0 if self.on_gpu else self.rates.threads)

    @property
    def machine_rate(self) -> float:
        """Images a second that this machine serves under its config file, one a request: its cores' time or its encoders' is
        what ends first."""
        return self.encode_rate * min(self.cores / self.cores_per_encoder, self.encoders)

    @property
    def encoders(self) -> int:
        """How many encoders of images the machine has room for."""
        return self.gpus if self.on_gpu else max(1, int(self.cores / self.cores_per_encoder))

    def million(self) -> float | None:
        """The price of a million images by the job or a saturated service; None without prices."""
        hourly = self.cores_per_encoder * self.prices.core + (self.prices.gpu if self.on_gpu else 0)
        return hourly * 1e6 / self.encode_rate / 3600 if hourly else None

    def as_json(self) -> dict[str, Any]:
        """What was measured, and what follows from it; the config file as text."""
        return {
            "model": self.model,
            "precision": self.precision,
            "reduced_jpeg": self.reduced_jpeg,
            **asdict(self.rates),
            "transport_requests_per_second": self.transport,
            "transport_s": self.transport_s,
            "cores": self.cores,
            "gpus": self.gpus,
            "batch": self.batch,
            "encoders": self.encoders,
            "cores_per_encoder": self.cores_per_encoder,
            "images_per_second": self.machine_rate,
            "price_of_a_million": self.million(),
            "config": self.config(),
        }

    def __str__(self) -> str:
        rates = self.rates
        own = "one GPU" if self.on_gpu else f"{rates.threads} threads"
        kept = " (reduced)" if self.reduced_jpeg else ""
        milliseconds, kilobytes, carried = rates.decode_s * 1000, rates.image_bytes / 1000, self.transport_s * 1000
        lines = [
            f"decode     {milliseconds:8.1f} ms of a core an image{kept}, {kilobytes:.0f} kB in the mean",
            *(f"encode     {rate:8.1f} images/s at batch {size}" for size, rate in rates.encode.items()),
            *(f"texts      {rate:8.1f} texts/s at batch {size}" for size, rate in rates.texts.items()),
            f"transport  {self.transport:8.1f} requests/s by one ingress, {carried:.1f} ms of a core each",
            "",
            f"An encoder ({own}, {rates.engine}, {self.precision}) takes {self.encode_rate:.1f} images/s in batches of "
            f"{self.batch}.",
            f"It needs {self.decoders:.2f} cores that decode; with transport and its own it keeps "
            f"{self.cores_per_encoder:.2f} cores busy.",
        ]
        if rates.failed:
            lines.append(f"{rates.failed} images of the sample do not decode.")
        has = f"{self.cores} cores, {self.gpus} GPU{'s' * (self.gpus > 1)}" if self.on_gpu else f"{self.cores} cores"
        lines.append(f"This machine ({has}) should serve {self.machine_rate:.0f} images/s, one a request.")
        hours = 1e6 / self.encode_rate / 3600
        takes = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        price = self.million()
        cost = f", {price:,.2f} at the given prices" if price is not None else "; give prices for its cost"
        lines.append(f"A million images take {takes} of it{cost}.")
        return "\n".join(lines)

    def config(self) -> str:
        """A config file with what was measured."""
        batch, text_batch = self.batch, best_batch(self.rates.texts)
        encoders = self.encoders
        decoding = min(self.decoders * encoders, self.cores)  # cores
        decoders = math.ceil(decoding / of_decoder())
        fewest = 2 if self.cores > 2 else 1
        ingresses = max(fewest, math.ceil(self.machine_rate / self.transport))
        # Reservations place replicas and do not limit them. Everything must find room at its largest size.
        replicas = ingresses + decoders + 2 * encoders
        share = min(1.0, math.floor(100 * 0.9 * self.cores / replicas) / 100)
        if self.on_gpu:
            own = "gpus_per_replica: 0.5  # an encoder of images and one of texts share a GPU"
        else:
            own = f"threads_per_replica: {self.rates.threads}  # as measured"
        reduced = "\n      reduced_jpeg: true" if self.reduced_jpeg else ""
        return f"""\
# Made by `clipfleet plan`: {self.encode_rate:.1f} images/s an encoder, {self.rates.decode_s * 1000:.1f} ms to decode an image.
http_options:
  host: 127.0.0.1
  port: 8000
applications:
  - name: clipfleet
    route_prefix: /
    import_path: deployments.graph:build
    args:
      model: {self.model}
      device: {"cuda" if self.on_gpu else "cpu"}
      precision: {self.precision}
      engine: {self.rates.engine}
      cpus_per_replica: {share}  # a reservation
      {own}{reduced}
    deployments:
      - name: Ingress
        ray_actor_options: {{num_cpus: {share}}}
        autoscaling_config:
          min_replicas: {fewest}
          max_replicas: {ingresses}
          target_ongoing_requests: {max(64, 4 * batch)}
      - name: ImageDecoder
        ray_actor_options: {{num_cpus: {share}}}
        max_ongoing_requests: 64
        autoscaling_config:
          min_replicas: 1
          max_replicas: {decoders}  # of {of_decoder()} threads; one encoder needs {self.decoders:.2f} cores that decode
          target_ongoing_requests: 4  # decoded at once by one replica
      - name: ImageEncoder
        max_ongoing_requests: {8 * batch}  # what waits here fills the next batches
        autoscaling_config:
          min_replicas: 1
          max_replicas: {encoders}
          target_ongoing_requests: {2 * batch}  # a batch in the model and one waiting: {2 * batch / self.encode_rate:.1f} s
        user_config:
          max_batch_size: {batch}  # reaches {_GOOD:.0%} of the best rate
          batch_wait_timeout_s: 0  # batches fill by themselves under load
      - name: TextEncoder
        max_ongoing_requests: {8 * text_batch}
        autoscaling_config:
          min_replicas: 1
          max_replicas: {encoders}
          target_ongoing_requests: {2 * text_batch}
        user_config:
          max_batch_size: {text_batch}
          batch_wait_timeout_s: 0
"""


def gpu_count() -> int:
    """GPUs of this machine."""
    from clipfleet.torch_engine import device_count

    return device_count()


def write_config(plan: Plan, out: Path) -> None:
    """Write the plan's config file. Raises SettingsError."""
    try:
        out.write_text(plan.config(), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
