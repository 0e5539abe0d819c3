"""A running application replaced by its successor without a gap: blue/green.

Serve rolls the deployments of one application independently, so a changed checkpoint would leave old ingresses with new
encoders. Here the successor is an application of its own under a hidden prefix. When all of it is ready the two change
prefixes, and the old one goes when it has nothing left to answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfleet.config_file import APPLICATION
from clipfleet.errors import SetupError
from deployments.deploying import NAMES, ask_ingresses, deploy, finish_requests, schema_of, wait_until_running

NEXT, PREVIOUS = "/-clipfleet-next", "/-clipfleet-previous"  # prefixes of the one that waits, and of the one that goes
READY_S = 60.0  # from running replicas to a first success of each
QUIET_S = 3.0  # without a request the old application has none to come: HAProxy follows a change in under 1 s
PATIENCE_S = 90.0  # until it has no new requests: uploads of a minute are among them

# What Serve changes in running replicas. All else replaces them, deployment by deployment.
_LIGHT = ("num_replicas", "autoscaling_config", "user_config", "max_ongoing_requests")


@dataclass
class Deployed:
    """What a command has on its Serve: the application's present name, and the config file's content."""

    client: Any
    config: dict[str, Any]
    name: str = APPLICATION
    other: str | None = None  # the one that comes or goes, during a change

    @property
    def names(self) -> list[str]:
        """The applications that may have requests."""
        return [name for name in (self.name, self.other) if name]

    def changes_in_place(self, config: dict[str, Any], *, same: bool) -> bool:
        """Whether running replicas can take over `config`; `same` says that the checkpoint's files are those that they have."""
        return same and _heavy(_with_kept(config, self.config)) == _heavy(self.config)

    def upgrade(self, config: dict[str, Any], is_ready: Callable[[str], bool], *, same: bool) -> None:
        """Put `config` in place of what runs; `same` says that the checkpoint's files are. `is_ready` asks the application
        at a route prefix. Raises SettingsError or SetupError; then what ran goes on."""
        config = _with_kept(config, self.config)
        schema = schema_of(_with_application(config, name=self.name))
        if self.changes_in_place(config, same=same):
            try:
                deploy(self.client, schema)
                wait_until_running(self.client, self.name)
            except SetupError:
                self._deploy_alone()  # Serve would keep trying
                raise
            self.config = config
        else:
            self._replace(config, is_ready)

    def _replace(self, config: dict[str, Any], is_ready: Callable[[str], bool]) -> None:
        old, new = self.name, NAMES[1 - NAMES.index(self.name)]
        self.other = new
        try:
            deploy(self.client, self._beside(_with_application(config, name=new, route_prefix=NEXT), None))
            wait_until_running(self.client, new)
            _wait(lambda: is_ready(NEXT), READY_S, f"{new} did not become ready")
            deploy(self.client, self._beside(_with_application(config, name=new), PREVIOUS))
        except Exception:  # not for KeyboardInterrupt: a stop takes both off
            self._deploy_alone()
            self.other = None
            raise
        self.name, self.other, self.config = new, old, config
        with suppress(SetupError):  # it may have clients that never pause
            _wait(lambda: _quiet_seconds(old) > QUIET_S and not _old_haproxies(), PATIENCE_S, "")
        with suppress(Exception):
            finish_requests(old)
        self._deploy_alone()
        self.other = None

    def _beside(self, config: dict[str, Any], prefix: str | None) -> Any:
        """The schema of `config` together with the application that runs, under another route prefix."""
        running = _application(_with_application(self.config, name=self.name))
        if prefix:
            running["route_prefix"] = prefix
        return schema_of({**config, "applications": [running, *config["applications"]]})

    def _deploy_alone(self) -> None:
        """Have Serve keep the present application and remove the other. Its controller remembers this, and not serve.delete."""
        deploy(self.client, schema_of(_with_application(self.config, name=self.name)))
        gone = NAMES[1 - NAMES.index(self.name)]
        with suppress(SetupError):  # an application that hangs on is no reason to stop the other
            _wait(lambda: gone not in [status.name for status in self.client.list_serve_statuses()], READY_S, "")


def _quiet_seconds(name: str) -> float:
    """Seconds since any ingress replica of the application had a request; 0 where one does not answer."""
    try:
        return min(ask_ingresses(name, "quiet_seconds", 10), default=float("inf"))
    except Exception:  # a replica that has just died
        return 0.0


def _old_haproxies() -> bool:
    """Whether an HAProxy from before the last change still has connections, whose requests go by its old configuration."""
    file = os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC")
    if not file or not os.path.isdir("/proc"):
        return False
    folder = f"{os.path.dirname(file)}/".encode()
    count = 0
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0") if entry.isdigit() else []
            count += b"-db" in words and any(word.startswith(folder) for word in words)
    return count > 1


def _wait(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SetupError(f"{otherwise} in {seconds:.0f} s")
        time.sleep(0.5)


def _with_kept(config: dict[str, Any], running: dict[str, Any]) -> dict[str, Any]:
    """`config`, which logs and traces as the running one does."""
    return {**config, **{name: running[name] for name in ("logging_config", "tracing_config") if name in running}}


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
