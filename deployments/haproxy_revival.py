"""HAProxy started anew at once when it dies, in the process of Serve's HAProxyManager.

Serve looks for it every 10 s and replaces the whole manager after three failures; until then connections are refused.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from loguru import logger

from deployments import haproxy_wrapper

_SETTLE_S = 0.05  # a process that Serve itself stopped is forgotten by then
_RETRY_S = 1.0
_SERVERS_S = 10.0  # for Serve to tell a new manager which replicas there are


def install() -> None:
    """Make Serve's HAProxyApi watch the process that it started. Calling it again changes nothing."""
    from ray.serve._private.haproxy import HAProxyApi

    api: Any = HAProxyApi
    if getattr(api.start, "revives", False):
        return
    start, reload = api.start, api._graceful_reload

    async def watched_start(self: Any) -> None:
        if haproxy_wrapper.take_over(Path(self.config_file_path)):
            # One that has outlived its manager serves on. The new one must not relieve it before it knows where to send.
            end = time.monotonic() + _SERVERS_S
            while not self.cfg.has_received_servers and time.monotonic() < end:
                await asyncio.sleep(_SETTLE_S)
        await start(self)
        self._revival_lock = asyncio.Lock()  # a reload and a revival would each start a process
        self._revival = asyncio.create_task(_revive(self))

    async def locked_reload(self: Any) -> None:
        async with self._revival_lock:
            if self._is_running():
                await reload(self)
                self._revival.cancel()  # it waits for the old one, which may have connections for minutes
                self._revival = asyncio.create_task(_revive(self))
            else:  # there is nothing to take over from
                self._proc = await self._start_and_wait_for_haproxy()

    watched_start.revives = True  # type: ignore[attr-defined]
    api.start, api._graceful_reload = watched_start, locked_reload


async def _revive(api: Any) -> None:
    while (process := api._proc) is not None:
        await process.wait()
        await asyncio.sleep(_SETTLE_S)
        async with api._revival_lock:  # held by a reload whose new process has asked this one to end
            if api._proc is not process:
                continue
            logger.error("HAProxy ended with {}; starting it anew", process.returncode)
            try:
                api._proc = await api._start_and_wait_for_haproxy()
            except Exception as error:  # such as a port that is still taken
                logger.error("HAProxy does not start: {}", error)
                await asyncio.sleep(_RETRY_S)
