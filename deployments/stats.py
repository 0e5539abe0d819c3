"""What the live view shows: the rates of one ingress replica, and the replicas of all deployments."""

from __future__ import annotations

import asyncio
import time

from ray import serve
from starlette.responses import Response

from deployments.requests import Requests
from deployments.responses import json_response
from deployments.schemas import public_model

_FRESH_S = 2.0  # the controller is not asked more often, however many look


class StatsRoute:
    """`GET /v1/stats`."""

    def __init__(self, requests: Requests, *, search: bool) -> None:
        self._requests = requests
        self._search = search
        self._replicas: dict[str, int] = {}
        self._asked = float("-inf")
        self._asking: asyncio.Task[dict[str, int]] | None = None

    async def stats(self) -> Response:
        """Items a second, batches and items in flight of the ingress replica that answers; the replicas of each deployment."""
        requests = self._requests
        model = requests.check_model()
        lanes = requests.admission.lanes
        return json_response(
            {
                "model": public_model(model),
                "search": self._search,
                "items_per_second": {tower: rate.now() for tower, rate in requests.rates.items()},
                "in_flight": {"image": lanes["images"].items, "text": lanes["texts"].items},
                "batch": requests.batches(),
                "replicas": await self._counted(),
            }
        )

    async def _counted(self) -> dict[str, int]:
        """What the controller said last. While it is away one question waits for it, and nobody for the answer."""
        if time.monotonic() - self._asked > _FRESH_S and (self._asking is None or self._asking.done()):
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(asyncio.to_thread(_running_replicas))
        if self._asking is not None:
            done, _ = await asyncio.wait([self._asking], timeout=_FRESH_S if not self._replicas else 0.2)
            for task in done:
                self._replicas = task.result() or self._replicas
        return self._replicas


def _running_replicas() -> dict[str, int]:
    """Of this application's deployments. What the controller cannot say now is missing."""
    try:
        found = serve.status().applications[serve.get_replica_context().app_name].deployments
    except Exception:  # whatever is wrong with the controller, the rest of the view is worth having
        return {}
    return {
        name: sum(count for state, count in each.replica_states.items() if state == "RUNNING")  # an enum of strings
        for name, each in found.items()
    }
