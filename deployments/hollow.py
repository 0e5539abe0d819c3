"""The graph without a model: the real ingress, with a decoder and encoders that do nothing, to measure transport alone.

`clipfleet plan` and the benchmarks serve it; what travels between the replicas is what the real ones send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application

from clipfleet.config_file import DEFAULT_MAX_ONGOING
from clipfleet.settings import ServiceSettings, service_settings
from deployments.encoder import Encoded, EncodedText
from deployments.ingress import Ingress

_PIXELS = np.zeros((224, 224, 3), np.uint8)
_VECTOR = np.zeros(512, np.float32)
_FINGERPRINT = "hollow"


class HollowDecoder:
    """Answers each image with the same black pixels."""

    async def decode(self, images: Sequence[bytes], deadline: float, preprocessing: str | None) -> list[np.ndarray]:
        return [_PIXELS] * len(images)

    async def probe(self, deadline: float) -> float:
        return 0.0


class HollowEncoder:
    """Answers each item with the same vector, through the same `@serve.batch` as the real encoder."""

    def __init__(self, tower: str, settings: ServiceSettings) -> None:
        self._outcome: Any = _VECTOR if tower == "image" else EncodedText(_VECTOR, False, 3)
        self._settings = settings

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0, max_concurrent_batches=32)
    async def _together(self, calls: list[Sequence[Any]]) -> list[list[Any]]:
        return [[self._outcome] * len(items) for items in calls]

    async def encode(self, items: Sequence[Any], deadline: float) -> Encoded:
        return Encoded(_FINGERPRINT, await self._together(items))

    async def probe(self, deadline: float) -> float:
        return 0.0

    async def describe(self) -> dict[str, Any]:
        return {
            "id": self._settings.served_model_name or "hollow", "revision": None, "dimension": len(_VECTOR),
            "context_length": 77, "image_size": 224, "fingerprint": _FINGERPRINT, "preprocessing": None, "precision": "float32",
            "engine": "none", "logit_scale": 100.0, "logit_bias": None,
            "alone_s": 1e-4,
        }  # fmt: skip


def build(args: dict[str, Any]) -> Application:
    """Build the application from a config file's `args`."""
    settings = service_settings(args)

    def bound(kind: type, name: str, *arguments: Any) -> Application:
        options: Any = serve.deployment(kind)  # type: ignore[arg-type]  # annotated for functions alone
        deployment = options.options(
            name=name, max_ongoing_requests=DEFAULT_MAX_ONGOING[name], ray_actor_options={"num_cpus": 0.1}
        )
        return deployment.bind(*arguments)

    return bound(
        Ingress,
        "Ingress",
        settings,
        bound(HollowDecoder, "ImageDecoder"),
        bound(HollowEncoder, "ImageEncoder", "image", settings),
        bound(HollowEncoder, "TextEncoder", "text", settings),
    )
