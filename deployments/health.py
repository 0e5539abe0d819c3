"""Whether each deployment really works: its last success, and a probe that fills the silence."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from loguru import logger
from ray.serve.handle import DeploymentHandle

_FRESH_S = 10.0  # a success older than this is no sign of life
_PROBE_EVERY_S = 3.0


class Health:
    """Watches the deployments behind one ingress replica from a task of its own."""

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        self._handles = handles
        self._last_success: dict[str, float] = {}  # time.monotonic()
        self._description: dict[str, dict[str, Any]] = {}
        self._changed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._watch(name)) for name in handles]

    def succeeded(self, *names: str) -> None:
        """Traffic went through these deployments just now."""
        for name in names:
            self._last_success[name] = time.monotonic()

    def forget_model(self) -> None:
        """Ask the encoders anew what they serve: one of them has changed."""
        self._description.clear()
        self._changed.set()

    @property
    def model(self) -> dict[str, Any] | None:
        """What the encoders say of their checkpoint; None until they run, or while they disagree."""
        texts, images = self._description.get("TextEncoder"), self._description.get("ImageEncoder")
        return images if images and texts and images["fingerprint"] == texts["fingerprint"] else None

    def alone_rate(self, encoder: str) -> float | None:
        """Items a second that an encoder does one by one, so about the least of what it can do; None until it runs."""
        described = self._description.get(encoder)
        return 1 / max(described["alone_s"], 1e-6) if described else None

    def deployments(self) -> dict[str, str]:
        """Each deployment's state: `ready`, or what is known instead."""
        return {"Ingress": "ready"} | {name: self._state(name) for name in self._handles}

    def ready(self) -> bool:
        """Whether each deployment has worked within the last 10 s."""
        return self.model is not None and set(self.deployments().values()) == {"ready"}

    def _state(self, name: str) -> str:
        last = self._last_success.get(name)
        if last is None:
            return "starting"
        age = time.monotonic() - last
        return "ready" if age <= _FRESH_S else f"no success for {age:.0f} s"

    async def _watch(self, name: str) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                try:
                    await asyncio.wait_for(self._probe(name), _FRESH_S)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise  # otherwise the replica's cancellation, not ours
                except Exception as error:  # whatever it is, the deployment does not work now; the next probe tells
                    if not isinstance(error, asyncio.TimeoutError):
                        logger.warning("probing {} failed: {}", name, (str(error).splitlines() or [repr(error)])[0])
            with contextlib.suppress(TimeoutError):
                pause = _PROBE_EVERY_S if name in self._last_success and self.model is not None else 0.2
                await asyncio.wait_for(self._changed.wait(), pause)
            self._changed.clear()

    async def _probe(self, name: str) -> None:
        handle = self._handles[name]
        if name != "ImageDecoder" and (name not in self._description or self.model is None):
            self._description[name] = await handle.describe.remote()
        idle = await handle.probe.remote(time.time() + _FRESH_S)
        if idle < _FRESH_S:
            self._last_success[name] = max(self._last_success.get(name, 0.0), time.monotonic() - idle)
