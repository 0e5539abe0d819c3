"""The way to a running service: requests that are tried again within a deadline, and its errors as ours."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from typing import Any

import httpx

from clipfleet import errors
from clipfleet.errors import ClipfleetError, DeadlineExceeded, SettingsError, Unavailable
from clipfleet.keys import authorization

_AGAIN = (429, 502, 503, 504)
_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_CONNECT_S = 10.0

# For an answer that is not the service's own, such as that of a proxy before it.
_KINDS: dict[int, type[ClipfleetError]] = {
    401: errors.InvalidApiKey,
    404: errors.RouteNotFound,
    413: errors.BodyTooLarge,
    429: errors.Overloaded,
}

logger = logging.getLogger(__name__)


class Connection:
    """Asks one service. Embedding is idempotent: whatever became of the first try, another one does no harm.

    Raises SettingsError if `url` is no http(s) address, or the key none for HTTP. Bound to the event loop that first asks.
    """

    def __init__(self, url: str, api_key: str | None, deadline_s: float) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise SettingsError(f"{url!r} is no address of a service; give one such as http://127.0.0.1:8000")
        self._http = httpx.AsyncClient(
            base_url=address,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            headers=authorization(api_key),
            # A proxy of the environment is for other machines.
            trust_env=address.host not in ("127.0.0.1", "::1", "localhost"),
        )
        self._deadline_s = deadline_s

    @property
    def url(self) -> str:
        return str(self._http.base_url)

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """An answer of 200. When no time is left for another try, raises what came of the last one; when the deadline passes
        during a try, DeadlineExceeded, which says what came of the one before."""
        end = time.monotonic() + self._deadline_s
        pause = _PAUSE_S
        problem: ClipfleetError | None = None
        while True:
            advised = 0.0
            try:
                answer = await self._try(method, path, headers or {}, end - time.monotonic(), body)
                if answer.status_code == 200:
                    return answer
                problem = error_of(answer)
                if answer.status_code not in _AGAIN:
                    raise problem
                advised = _advised(answer)
            except TimeoutError:
                before = f"; before that: {problem}" if problem else ""
                raise DeadlineExceeded(f"{self.url} gave no answer within {self._deadline_s:g} s{before}") from None
            except httpx.RequestError as error:
                problem = self._unanswered(error)
                if not _may_heal(error):
                    raise problem from error
            wait = advised + random.uniform(0, pause)  # those who failed together do not come back together
            if time.monotonic() + wait >= end:
                raise problem
            logger.info("trying again in %.1f s: %s", wait, problem)
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _try(
        self, method: str, path: str, headers: dict[str, str], left: float, body: dict[str, Any]
    ) -> httpx.Response:
        left = max(left, 0.001)
        asked = {**headers, "X-Deadline-Ms": f"{max(1, int(left * 1000))}"}  # nobody waits for it any longer
        timeout = httpx.Timeout(None, connect=_CONNECT_S)  # httpx's are for each step
        async with asyncio.timeout(left):
            return await self._http.request(method, path, headers=asked, timeout=timeout, **body)

    def _unanswered(self, error: httpx.RequestError) -> ClipfleetError:
        if isinstance(error, httpx.DecodingError):
            return Unavailable(f"{self.url} gave an answer that does not decode: {error}")
        return Unavailable(f"{self.url} cannot be reached: {type(error).__name__} {error}".rstrip())


def _may_heal(error: httpx.RequestError) -> bool:
    """Whether another try may succeed: not with a certificate that is not trusted, an answer that does not decode, or a
    request that is no HTTP."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.LocalProtocolError)


def error_of(answer: httpx.Response) -> ClipfleetError:
    """The error that an answer stands for: by its body's code where the service wrote it, otherwise by its status."""
    status = answer.status_code
    other = _KINDS.get(status, Unavailable if status >= 500 else errors.InvalidRequest)
    try:
        error = answer.json()["error"]
        kind = errors.by_code(error["code"]) or other
        return kind(str(error["message"]), index=_index(error["param"]), status=status)
    except (ValueError, KeyError, TypeError):
        return other(f"{answer.url} answered {status}: {answer.text[:500]}", status=status)


def _index(param: str | None) -> int | None:
    """3 of `input[3]` and `files[3]`."""
    number = (param or "").partition("[")[2].rstrip("]")
    return int(number) if number.isdecimal() else None


def _advised(answer: httpx.Response) -> float:
    """Seconds to wait by Retry-After; 0 without one, or where it is a date."""
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0
