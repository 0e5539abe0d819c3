"""Replicas that go, and stops, wait as long as a request may take; the router in front of them does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray.serve import Application

from deployments import deploying, graph


def deployments(application: Application) -> Iterator[object]:
    bound = application._bound_deployment
    yield bound
    for argument in bound.init_args:
        if isinstance(argument, Application):
            yield from deployments(argument)


@pytest.mark.parametrize(("limits", "seconds"), [({}, 35), ({"deadline_s": 90}, 95)])
def test_a_replica_that_is_to_go_has_the_deadline_and_some(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], seconds: float
) -> None:
    monkeypatch.setattr(graph, "_encoder_resources", lambda settings: {"num_cpus": 1})  # asks a Ray that runs
    found = list(deployments(graph.build({"model": "tiny", "limits": limits})))
    assert {one.name: one._deployment_config.graceful_shutdown_timeout_s for one in found} == dict.fromkeys(  # type: ignore[attr-defined]
        ("Ingress", "ImageDecoder", "ImageEncoder", "TextEncoder"), seconds
    )


def test_the_router_never_pauses_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Serve's half second a backlog goes on at four requests a second: `python -m faults overload` shows it."""
    monkeypatch.setattr(graph, "_encoder_resources", lambda settings: {"num_cpus": 1})
    found = list(deployments(graph.build({"model": "tiny"})))
    assert len(found) == 4
    for one in found:
        router = one._deployment_config.request_router_config  # type: ignore[attr-defined]
        assert router.initial_backoff_s <= router.max_backoff_s == 0.025


class Client:
    """Serve's, which takes what it is given."""

    def deploy_apps(self, schema: object) -> None:
        pass

    def get_serve_details(self) -> dict[str, object]:
        return {}


def test_a_stop_waits_for_the_longest_deadline_that_was_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(deploying, "_deadlines", {0.0})
    monkeypatch.setattr(deploying, "ask_ingresses", lambda name, method, seconds: waited.append(seconds))
    for limits in ({"deadline_s": 90}, {}, {"deadline_s": "slip of the pen"}):
        application = {"name": "clipfleet", "import_path": "deployments.graph:build", "args": {"limits": limits}}
        deploying.deploy(Client(), deploying.schema_of({"applications": [application]}))
    deploying.finish_requests("clipfleet")
    assert waited == [90 + deploying.DRAIN_S]
