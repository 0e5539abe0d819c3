"""What every request passes: the API key, the deadline, the fingerprint header, and errors as our own bodies."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from loguru import logger
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipfleet.errors import (
    ClipfleetError,
    InvalidApiKey,
    InvalidRequest,
    RouteNotFound,
    SettingsError,
    Unavailable,
)
from clipfleet.keys import KeyRing
from deployments import memory, tracing, web
from deployments.bodies import invalid
from deployments.haproxy_wrapper import HEALTH_PATHS
from deployments.metrics import RequestMetrics
from deployments.responses import FINGERPRINT_HEADER, error_response

REQUEST_ID_HEADER = "X-Request-Id"
DEADLINE_HEADER = "X-Deadline-Ms"
KEY_NAME = "clipfleet.key"  # in the scope: the name of the request's API key
_LOOK_EVERY_S = 1.0
# HAProxy lets headers through that fill its buffer. What reads them takes seconds for megabytes, and stops all others.
_HEADER_BYTES = 64 * 2**10


class Gate:
    """The outermost ASGI layer around the routes."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, fingerprint: Callable[[], str | None]) -> None:
        self._app = app
        self.metrics = RequestMetrics()
        self._keys = keys
        self._looked = 0.0  # time.monotonic() of the last look at the file of keys
        self._fingerprint = fingerprint
        self._inflight = 0
        self._last = time.monotonic()  # of a request's end
        self._idle = asyncio.Event()
        self._stopping = False

    async def drain(self) -> None:
        """Refuse newcomers, and return when all that came before them is answered."""
        self._stopping = True
        while self._inflight:
            self._idle.clear()
            await self._idle.wait()

    def quiet_seconds(self) -> float:
        """Seconds since the last request ended; 0 while there is one. Health checks do not count."""
        return 0.0 if self._inflight else time.monotonic() - self._last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        name = _request_id(scope)

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if fingerprint := self._fingerprint():
                    MutableHeaders(scope=message).setdefault(FINGERPRINT_HEADER, fingerprint)
            await send(message)

        with logger.contextualize(request=name, **tracing.name()):
            try:
                await self._pass(scope, receive, send_stamped)
            except Exception:
                if not status:
                    raise  # otherwise it was answered and logged by our handler, and is only passed on for the server's log
            finally:
                route = getattr(scope.get("route"), "path", "none")  # of the framework, for what it knows
                took = time.perf_counter() - began
                if not _is_health(scope):
                    self.metrics.answered(route, status, took)
                    if status >= 500:
                        logger.warning("{} {} was answered {} after {:.2f} s", scope["method"], route, status, took)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._stopping:
                raise Unavailable("the service is stopping", retry_after=1)
            _check_headers(scope)
            self._check_key(scope)
        except ClipfleetError as error:
            await error_response(error)(scope, receive, send)
            return
        if not _path(scope):  # an application with a prefix, asked for without the slash that the page's links need
            await RedirectResponse(f"{scope['path']}/")(scope, receive, send)
            return
        counts = not _is_health(scope)
        self._inflight += counts
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the client has left
            memory.collect_soon()
            raise
        finally:
            self._inflight -= counts
            self._last = time.monotonic() if counts else self._last
            if not self._inflight:
                self._idle.set()

    def _check_key(self, scope: Scope) -> None:
        if not self._keys.asks or _is_open(scope):
            return
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            try:
                self._keys.refresh()
            except SettingsError as error:
                logger.error("the API keys stay as they were: {}", error.message)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self._keys.name_of(key.strip())
        if scheme.lower() != "bearer" or name is None:
            raise InvalidApiKey("the API key is missing or wrong; send it as Authorization: Bearer KEY")
        scope[KEY_NAME] = name


def with_cors(app: ASGIApp, origins: Sequence[str], exposed: Sequence[str]) -> ASGIApp:
    """Let pages of these origins ask, and read the `exposed` headers. It goes around the gate: a preflight has no key."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=[
            "*"
        ],  # OpenAI's client sends some of its own; cookies, which would make that unsafe, are not allowed
        expose_headers=[*exposed, "Retry-After"],
    )


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _is_health(scope: Scope) -> bool:
    return _path(scope) in HEALTH_PATHS


def _is_open(scope: Scope) -> bool:
    return _path(scope) in (*HEALTH_PATHS, *web.PATHS)


def _request_id(scope: Scope) -> str:
    """The request's name in the log. Serve gives one to those that have none, and puts it into the answer."""
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    return given if re.fullmatch(r"[!-~]{1,128}", given) else "unnamed"


def _check_headers(scope: Scope) -> None:
    size = len(scope["path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > _HEADER_BYTES:
        raise InvalidRequest(f"address and headers have {size:,} bytes; the limit is {_HEADER_BYTES:,}")


def add_error_handlers(app: FastAPI) -> None:
    """Word the framework's own errors as ours."""
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClipfleetError, _own_error)
    app.add_exception_handler(ClientDisconnect, _nobody_left)
    app.add_exception_handler(Exception, _unforeseen)


async def _invalid_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = invalid([{**problem, "loc": problem["loc"][1:]} for problem in error.errors()])
    return error_response(wrong, wrong.data["param"])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    if error.status_code in (404, 405):
        allowed = (error.headers or {}).get("Allow")  # with 405
        problem = (
            f"{request.url.path} takes {allowed}, not {request.method}" if allowed else f"there is no route {what}"
        )
        response = error_response(RouteNotFound(f"{problem}; /docs lists the routes"))
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        return response
    return error_response(InvalidRequest(f"{what}: {error.detail}"))


async def _own_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ClipfleetError)
    return error_response(error, error.data.get("param"))


async def _nobody_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # never arrives: the client hung up in the middle of its request


async def _unforeseen(_: Request, error: Exception) -> Response:
    logger.opt(exception=error).error("a request failed in a way that nobody foresaw")
    return error_response(Unavailable("the service failed on this request; its log has the cause", retry_after=1))


def read_deadline(request: Request, longest_s: float) -> float:
    """The request's deadline as wall-clock time: `longest_s` from now, or sooner by its own header."""
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return time.time() + longest_s
    if re.fullmatch("0{0,9}[1-9][0-9]{0,14}", text) is None:  # more digits would overflow a float
        raise InvalidRequest(f"{DEADLINE_HEADER} must be a whole number of milliseconds above 0, of up to 15 digits")
    return time.time() + min(longest_s, int(text) / 1000)
