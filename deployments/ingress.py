"""The HTTP ingress: the routes behind their gate, and nothing that touches pixels."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from clipfleet.keys import KeyRing
from clipfleet.settings import ServiceSettings
from deployments import grpc_calls, logs, memory, one_piece, prefixes, tracing
from deployments.gate import REQUEST_ID_HEADER, Gate, with_cors
from deployments.own_config import check_own_replicas, check_own_scaling
from deployments.requests import Requests
from deployments.responses import ERRORS_HEADER, FINGERPRINT_HEADER
from deployments.routes import make_app
from deployments.search import Searcher, SearchRoute


@serve.ingress()
class Ingress:
    """Validates, admits, spreads a request's items over the deployments, and words the answer."""

    def __init__(
        self,
        settings: ServiceSettings,
        decoder: DeploymentHandle,
        image_encoder: DeploymentHandle,
        text_encoder: DeploymentHandle,
    ) -> None:
        check_own_scaling()
        check_own_replicas(settings)
        logs.set_up(settings.log_format)
        tracing.set_up()
        memory.return_freed()
        grpc_calls.free_cancelled_calls()
        prefixes.accept_any()
        one_piece.hold_heads()
        self._settings = settings
        self._handles = {"ImageDecoder": decoder, "ImageEncoder": image_encoder, "TextEncoder": text_encoder}
        self._gate: Gate | None = None
        self._searcher: Searcher | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        requests = Requests(self._settings, self._handles)
        memory.collect_rarely()
        keys = KeyRing(self._settings.api_keys, self._settings.api_keys_file)
        self._searcher = Searcher(self._settings.search) if self._settings.search else None
        search = SearchRoute(requests, self._searcher)
        app = make_app(requests, search, asks_keys=keys.asks, page=self._settings.page)
        self._gate = Gate(app, keys=keys, fingerprint=lambda: requests.fingerprint)
        requests.export(self._gate.metrics)
        exposed = (FINGERPRINT_HEADER, ERRORS_HEADER, REQUEST_ID_HEADER)
        return with_cors(self._gate, self._settings.cors_origins, exposed)

    async def drain(self) -> None:
        """Refuse newcomers, and wait until every request is answered."""
        if self._gate is not None:
            await self._gate.drain()

    async def quiet_seconds(self) -> float:
        """Seconds since the last request."""
        if self._searcher is not None:
            self._searcher.close()  # who asks has put another ingress in its place, which wants the folder
        return self._gate.quiet_seconds() if self._gate is not None else 0.0
