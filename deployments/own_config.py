"""What a replica checks of its own deployment's config, which under `serve run` nobody has seen before it."""

from __future__ import annotations

from ray import serve

from clipfleet.config_file import check_batching, check_one_ingress, check_scaling
from clipfleet.settings import BatchSettings, ServiceSettings, parse


def check_own_scaling() -> tuple[str, int, float | None]:
    """Refuse contradictory scaling; returns the deployment, its max_ongoing_requests and its target_ongoing_requests."""
    context = serve.get_replica_context()
    config = context._deployment_config
    autoscaling = config.autoscaling_config
    target = autoscaling.get_target_ongoing_requests() if autoscaling else None
    check_scaling(context.deployment, config.max_ongoing_requests, target)
    return context.deployment, config.max_ongoing_requests, target


def check_own_replicas(settings: ServiceSettings) -> None:
    """Refuse several ingress replicas where one alone can open what is searched."""
    config = serve.get_replica_context()._deployment_config
    most = config.autoscaling_config.max_replicas if config.autoscaling_config else config.num_replicas
    check_one_ingress(settings, most or 1)


def own_batching() -> BatchSettings:
    """What an encoder is configured with when it starts. Raises SettingsError for contradictions.

    Not for `reconfigure`: Serve calls that before the new config is the replica's own.
    """
    name, ceiling, target = check_own_scaling()
    batch = parse(BatchSettings, serve.get_replica_context()._deployment_config.user_config, f"{name}.user_config")
    check_batching(name, batch, ceiling, target)
    return batch
