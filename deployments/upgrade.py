"""A running application replaced by its successor without a gap: blue/green.

Serve rolls the deployments of one application independently, so a changed checkpoint would leave old ingresses with new
encoders. Here the successor is an application of its own under a hidden prefix. When all of it is ready the two change
prefixes, and the old one goes when it has nothing left to answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clipfleet.errors import SetupError
from clipfleet.settings import APPLICATION
from deployments.deploying import ask_ingresses, deploy, schema_of, take_off, wait_until_running

NAMES = (APPLICATION, f"{APPLICATION}_next")  # they take turns
NEXT, PREVIOUS = "/-clipfleet-next", "/-clipfleet-previous"  # prefixes of the one that waits, and of the one that goes
QUIET_S = 3.0  # without a request the old application has none to come: HAProxy follows a change in under 1 s
PATIENCE_S = 60.0  # for the old application's last requests

# What Serve changes in running replicas. All else replaces them, deployment by deployment.
_LIGHT = ("num_replicas", "autoscaling_config", "user_config", "max_ongoing_requests")


@dataclass
class Deployed:
    """What a command has on its Serve: the application's present name, and the config file's content."""

    client: Any
    config: dict[str, Any]
    name: str = APPLICATION

    def upgrade(self, config: dict[str, Any], is_ready: Callable[[str], bool], *, same: bool) -> None:
        """Put `config` in place of what runs; `same` says that the checkpoint's files are. `is_ready` asks the application
        at a route prefix. Raises SettingsError or SetupError; then what ran goes on."""
        if "logging_config" in self.config:
            config = {**config, "logging_config": self.config["logging_config"]}
        schema = schema_of(_with_application(config, name=self.name))
        if same and _heavy(config) == _heavy(self.config):
            deploy(self.client, schema)
            wait_until_running(self.client, self.name)
        else:
            self._replace(config, is_ready)
        self.config = config

    def _replace(self, config: dict[str, Any], is_ready: Callable[[str], bool]) -> None:
        old, new = self.name, NAMES[1 - NAMES.index(self.name)]
        try:
            deploy(self.client, schema_of(_with_application(config, name=new, route_prefix=NEXT)))
            wait_until_running(self.client, new)
            _wait(lambda: is_ready(NEXT), f"{new} did not become ready")
        except BaseException:
            self._take_off(new)
            raise
        both = _with_application(config, name=new)
        both["applications"] = [
            _application(_with_application(self.config, name=old, route_prefix=PREVIOUS)), *both["applications"]
        ]  # fmt: skip
        deploy(self.client, schema_of(both))
        self.name = new
        wait_until_running(self.client, new)
        with suppress(SetupError):  # it may have clients that never pause
            _wait(lambda: _quiet_seconds(old) > QUIET_S, "")
        self._take_off(old)

    def _take_off(self, name: str) -> None:
        take_off(name)
        with suppress(SetupError):  # an application that hangs on is no reason to stop the other
            _wait(lambda: name not in [status.name for status in self.client.list_serve_statuses()], "")


def _quiet_seconds(name: str) -> float:
    """Seconds since any ingress replica of the application had a request; 0 where one does not answer."""
    try:
        return min(ask_ingresses(name, "quiet_seconds", 10), default=float("inf"))
    except Exception:  # a replica that has just died
        return 0.0


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SetupError(f"{otherwise} in {PATIENCE_S:.0f} s")
        time.sleep(0.5)


def _application(config: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in config["applications"] if entry["name"] in NAMES)


def _with_application(config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The config with other values in its own application."""
    return {
        **config,
        "applications": [
            {**entry, **changed} if entry["name"] in NAMES else entry for entry in config["applications"]
        ],
    }  # fmt: skip


def _heavy(config: dict[str, Any]) -> dict[str, Any]:
    """What of the application cannot change in running replicas."""
    application = _application(config)
    deployments = [
        {name: value for name, value in entry.items() if name not in _LIGHT}
        for entry in application.get("deployments") or []
    ]
    return {**application, "deployments": sorted(deployments, key=lambda entry: entry["name"])}
