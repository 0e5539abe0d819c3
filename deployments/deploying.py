"""The application of a config file on a Serve: checked, deployed, waited for, taken off."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from clipfleet.config_file import APPLICATION
from clipfleet.errors import SettingsError, SetupError
from clipfleet.settings import LimitSettings, meant, parse
from deployments.private_ray import LOOPBACK, is_lost, leave_at_once

NAMES = (APPLICATION, f"{APPLICATION}_next")  # those of a command: two take turns when one replaces the other
START_S = 1800  # a large checkpoint may have to be converted first
UNPLACED_S = 60  # a replica that no node has room for is waited for this long
_LOOP_S = 5.0  # for calls that still run to notice that they have been given up
PROXIES_S = 60  # for Serve's proxies to start
DRAIN_S = 10  # at a stop, requests in flight have their deadline and this to finish
STOP_S = 20  # and all the rest of a stop has this
_deadlines = {0.0}  # s, of all that was deployed; the longest counts


def schema_of(config: dict[str, Any]) -> Any:
    """The config as Serve's own type, which checks what clipfleet.config_file leaves to it. Raises SettingsError."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        LoggingConfig,
        ServeApplicationSchema,
        ServeDeploySchema,
        TracingConfig,
    )

    from deployments import tracing

    try:
        schema = ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise SettingsError("; ".join(problems)) from None
    # Serve passes over what it does not know, a slip of the pen too.
    _refuse_unknown(config, ServeDeploySchema, "")
    _refuse_unknown(config.get("http_options"), HTTPOptionsSchema, "http_options.")
    _refuse_unknown(config.get("logging_config"), LoggingConfig, "logging_config.")
    _refuse_unknown(config.get("tracing_config"), TracingConfig, "tracing_config.")
    for application in config["applications"]:
        _refuse_unknown(application, ServeApplicationSchema, "")
        for deployment in application.get("deployments") or []:
            where = f"{deployment.get('name')}."
            _refuse_unknown(deployment, DeploymentSchema, where)
            _refuse_unknown(deployment.get("autoscaling_config"), AutoscalingConfig, f"{where}autoscaling_config.")
    traces = schema.tracing_config
    if traces is not None and traces.enabled and traces.exporter_import_path:
        tracing.check(traces.exporter_import_path)  # in replicas a mistake would show late
    return schema


def _refuse_unknown(values: Any, kind: Any, where: str) -> None:
    for name in set(values if isinstance(values, dict) else ()) - set(kind.model_fields):
        known = sorted(kind.model_fields)
        hint = meant(str(name), known) or f"there are {', '.join(known)}"
        raise SettingsError(f"{where}{name}: there is no such setting; {hint}")


def start_serve(options: dict[str, Any], host: str, port: int, schema: Any) -> tuple[Any, list[Any]]:
    """Start Serve, or find the one that runs. Returns its client, and what tells that its proxies run.

    Serve's own serve_start waits for the proxies; here the application is built meanwhile.
    """
    from ray.serve._private import api
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.exceptions import RayServeException

    log = logging.getLogger("ray.serve")
    log.setLevel(logging.WARNING)
    log.addFilter(lambda record: "queue length" not in record.getMessage())  # of a busy replica: no news at a stop
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    options = {**options, "host": LOOPBACK if behind_haproxy else host, "port": port}
    with suppress(RayServeException):
        client: Any = api._get_global_client()
        api._check_http_options(client, options)  # of a Serve that runs already; it warns
        return client, []
    controller, proxies = api._create_controller_and_proxy_refs(
        options,
        None,
        schema.logging_config,
        schema.tracing_config,
        api._coerce_controller_options(None),
        "HeadOnly",
    )
    client = ServeControllerClient(controller)
    api._set_global_client(client)
    return client, proxies


def deploy(client: Any, schema: Any) -> None:
    """Ask Serve for the applications of `schema`."""
    for application in schema.applications:
        if application.name in NAMES:
            with suppress(SettingsError):  # of which build speaks
                _deadlines.add(parse(LimitSettings, application.args.get("limits"), "limits").deadline_s)
    client.deploy_apps(_with_others(client, schema))


def _with_others(client: Any, schema: Any) -> Any:
    """The configuration together with other people's applications of a running Serve, which removes what is not named.

    What somebody else deploys between this look and Serve's is removed: Serve has no way to change one application alone.
    """
    ours = {*NAMES, *(application.name for application in schema.applications)}
    running = client.get_serve_details()
    others = [
        details["deployed_app_config"]
        for name, details in running.get("applications", {}).items()
        # The configuration of one that serve.run has replaced, or that is on its way out, is old.
        if name not in ours
        and details.get("deployed_app_config")
        and details.get("source") == "declarative"
        and details.get("status") != "DELETING"
    ]
    capacity = {"target_capacity": running["target_capacity"]} if running.get("target_capacity") is not None else {}
    return type(schema).model_validate(
        {
            **capacity,
            **schema.model_dump(exclude_unset=True),
            "applications": [
                *others,
                *(application.model_dump(exclude_unset=True) for application in schema.applications),
            ],
        }
    )


def cause(message: str) -> str:
    """The error that a status message of Serve ends in, without the traceback above it."""
    lines = message.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: \S", line)]
    text = "\n".join(lines[starts[-1] if starts else -1 :])
    return re.sub(r"^clipfleet\.errors\.\w+: ", "", text)


def wait_until_running(client: Any, name: str) -> None:
    """Raises SetupError if a deployment does not start, not within half an hour, or finds no room."""
    unplaced_since: float | None = None
    end = time.monotonic() + START_S
    while (status := client.get_serve_status(name)).app_status.status != "RUNNING":
        for deployment in status.deployment_statuses:
            if "failed to start" in deployment.message:
                raise SetupError(f"{deployment.name} did not start: {cause(deployment.message)}")
        if status.app_status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise SetupError(f"{name} did not start: {cause(status.app_status.message)}")
        waiting = [d for d in status.deployment_statuses if "to be scheduled" in d.message]
        unplaced_since = (unplaced_since or time.monotonic()) if waiting else None
        # Serve itself says so only after 30 s.
        if unplaced_since and time.monotonic() - unplaced_since > UNPLACED_S - 30:
            raise SetupError(_no_room(waiting[0].name, waiting[0].message))
        if time.monotonic() > end:
            starting = [d.name for d in status.deployment_statuses if d.status.value != "HEALTHY"]
            raise SetupError(f"{' and '.join(starting) or name} did not start within {START_S // 60} minutes")
        time.sleep(0.2)


def wait_for_proxies(client: Any, proxies: list[Any]) -> None:
    """Raises SetupError if Serve's proxies do not start."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(proxies, timeout=PROXIES_S)
        client.wait_for_proxies_serving()
    except (RayError, TimeoutError) as error:  # such as a port that is taken
        raise SetupError(f"Serve's proxy did not start: {cause(str(error))}") from None


def _no_room(deployment: str, message: str) -> str:
    import ray

    asked = re.search(r"Resources required for each replica: (\{.*?\})", message)
    total, free = ray.cluster_resources(), ray.available_resources()  # what is used up is not in the latter
    left = ", ".join(f"{name} {free.get(name, 0):g} of {total[name]:g}" for name in ("CPU", "GPU") if name in total)
    return f"no room for a replica of {deployment} in {UNPLACED_S} s: it asks for {asked[1] if asked else '?'}, free are {left}"


def ask_ingresses(name: str, method: str, timeout_s: float) -> list[Any]:
    """Call a method of every ingress replica of application `name`. Raises TimeoutError, or what the call raised."""

    async def ask() -> list[Any]:
        from ray import serve

        return await serve.get_app_handle(name).broadcast(method).results_async()

    return asyncio.run_coroutine_threadsafe(ask(), _calls()).result(timeout_s)


@lru_cache(maxsize=1)
def _calls() -> asyncio.AbstractEventLoop:
    """An event loop that always runs: Serve stops telling a handle about its replicas when its loop pauses."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="calls", daemon=True).start()
    return loop


def _end_calls() -> None:
    """End the loop before Ray goes: whatever in it asked Ray for something afterwards would start another Ray."""
    if _calls.cache_info().currsize:
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # its clients say that the loop has gone
        _calls().call_soon_threadsafe(_calls().stop)
        end = time.monotonic() + _LOOP_S
        while _calls().is_running() and time.monotonic() < end:
            time.sleep(0.01)
        _calls.cache_clear()


def finish_requests(name: str) -> None:
    """Wait until every ingress replica has answered what it holds; newcomers get 503.

    Only then may the application go: Serve would take decoders and encoders away from requests that still need them.
    """
    ask_ingresses(name, "drain", max(_deadlines) + DRAIN_S)


def stop(names: Sequence[str], *, stays: bool = False) -> None:
    """Finish the requests of the applications, and let go of Ray, which may be one that stays: then they are taken off it."""
    if "ray" not in sys.modules or is_lost():
        return
    import ray

    # Nothing that Ray may wait for must keep the command alive. Of a Ray of its own the guardian then ends what is left.
    left = "the application may still be on it" if stays else "it was killed"
    seconds = (max(_deadlines) + DRAIN_S) * max(1, len(names)) + STOP_S
    last_resort = threading.Timer(
        seconds, leave_at_once, [SetupError(f"Ray did not stop within {seconds:.0f} s; {left}")]
    )
    last_resort.daemon = True
    last_resort.start()
    with suppress(Exception, KeyboardInterrupt):  # a second Ctrl-C ends the patience, not the cleaning up
        for name in names if ray.is_initialized() else ():
            with suppress(Exception):
                finish_requests(name)
    with suppress(Exception, KeyboardInterrupt):
        from ray.serve._private import api
        from ray.serve.schema import ServeDeploySchema

        if names and stays:
            # What Serve's controller is asked for it remembers when it dies; what serve.delete removed would come back.
            deploy(api._get_global_client(), ServeDeploySchema(applications=[]))
    with suppress(Exception, KeyboardInterrupt):
        _end_calls()
    with suppress(Exception, KeyboardInterrupt):
        ray.shutdown()
    last_resort.cancel()
