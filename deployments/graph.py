"""The deployment graph: `build(args)` composes ingress, decoder and the two encoders.

    clipfleet serve · serve run serve_config.yaml · serve deploy serve_config.yaml

Replica counts, autoscaling and queue lengths come from the config file's `deployments:`; what is set here holds
where that is silent. The resources of encoders come from `args` alone, because Serve would replace
`ray_actor_options` whole.
"""

from __future__ import annotations

from typing import Any

import ray
from loguru import logger
from ray import serve
from ray.serve import Application

from clipfleet.config_file import DEFAULT_MAX_ONGOING
from clipfleet.engines import settle_device
from clipfleet.settings import ServiceSettings, service_settings
from deployments.decoder import DecoderReplica
from deployments.encoder import EncoderReplica
from deployments.ingress import Ingress

# Of Serve's router while all replicas are full. It goes on pausing when they are free again, for as long as a request that it
# looked for a place for lies behind others: with Serve's 0.5 s, four requests a second pass to a replica that could do dozens.
_ROUTER_PAUSE_S = 0.025


def build(args: dict[str, Any]) -> Application:
    """Build the application from a config file's `args`. Raises SettingsError."""
    settings = service_settings(args)
    resources = _encoder_resources(settings)
    lifecycle = _lifecycle(settings)

    def encoders(name: str, tower: str) -> Application:
        options = _deployment(EncoderReplica)(
            name=name, max_ongoing_requests=DEFAULT_MAX_ONGOING[name], ray_actor_options=resources, **lifecycle
        )
        return options.bind(tower, settings)

    decoder = _deployment(DecoderReplica)(
        name="ImageDecoder",
        max_ongoing_requests=DEFAULT_MAX_ONGOING["ImageDecoder"],
        ray_actor_options={"num_cpus": 1},
        **lifecycle,
    )
    # The ingress admits by items and bytes itself; Serve must not refuse before it, in plain text.
    ingress = _deployment(Ingress)(
        name="Ingress",
        max_ongoing_requests=DEFAULT_MAX_ONGOING["Ingress"],
        ray_actor_options={"num_cpus": 0.5},
        **lifecycle,
    )
    return ingress.bind(
        settings,
        decoder.bind(settings),
        encoders("ImageEncoder", "image"),
        encoders("TextEncoder", "text"),
    )


def _deployment(kind: type) -> Any:
    deployment: Any = serve.deployment(kind)  # annotated for functions alone
    return deployment.options


def _lifecycle(settings: ServiceSettings) -> dict[str, Any]:
    return {
        "health_check_period_s": 2,  # a dead replica is noticed that soon; Serve's default is 10
        "health_check_timeout_s": 10,  # one that stands still is replaced after three of these; Serve's default is 30
        "graceful_shutdown_timeout_s": settings.limits.deadline_s + 5,  # what is in flight ends before: none is lost
        "graceful_shutdown_wait_loop_s": 0.5,
        "request_router_config": {"max_backoff_s": _ROUTER_PAUSE_S},
    }


def _encoder_resources(settings: ServiceSettings) -> dict[str, Any]:
    """`ray_actor_options` of an encoder: a share of a GPU where the cluster has GPUs, otherwise CPUs."""
    device = settle_device(settings.device, settings.engine, settings.precision)
    gpus = ray.cluster_resources().get("GPU", 0) if device == "auto" else 0
    if device.startswith("cuda") or gpus:
        logger.info("encoders take {} of a GPU each", settings.gpus_per_replica)
        return {"num_gpus": settings.gpus_per_replica, "num_cpus": settings.cpus_per_replica}
    logger.info("encoders run on CPUs, {} each", settings.cpus_per_replica)
    return {"num_cpus": settings.cpus_per_replica}
