"""What the metrics port exports, and that dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deployments.broken import BROKEN
from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service

OPERATIONS = ROOT / "operations"
OURS = {
    "ray_clipfleet_batch_size": "histogram",
    "ray_clipfleet_queue_wait_seconds": "histogram",
    "ray_clipfleet_forward_seconds": "histogram",
    "ray_clipfleet_decode_seconds": "histogram",
    "ray_clipfleet_request_seconds": "histogram",
    "ray_clipfleet_items_total": "counter",
    "ray_clipfleet_errors_total": "counter",
    "ray_clipfleet_requests_total": "counter",
    "ray_clipfleet_cache_lookups_total": "counter",
    "ray_clipfleet_inflight_items": "gauge",
    "ray_clipfleet_inflight_bytes": "gauge",
}
THEIRS = {"ray_serve_deployment_replica_healthy"}  # Serve's
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def exported(service: Service) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", service.metrics(), re.MULTILINE))


def labels(page: str, name: str) -> list[dict[str, str]]:
    return [dict(LABEL.findall(line)) for line in page.splitlines() if line.startswith(f"{name}{{")]


def test_every_metric_is_exported_under_its_name(service: Service, http: httpx.Client, files: list[bytes]) -> None:
    before = service.total("ray_clipfleet_requests_total", path="/v1/embeddings/images", status="422")
    http.post("/v1/embeddings", json={"input": "a text for the metrics"})
    http.post("/v1/embeddings/images", files=[("files", ("a", files[0]))])
    http.post("/v1/embeddings/images", files=[("files", ("a", BROKEN["cut JPEG"].data))])
    http.get("/v1/models/some/other/model")
    http.get("/no/such/route")
    until(lambda: OURS.items() <= exported(service).items(), 30, "all metrics")
    until(
        lambda: service.total("ray_clipfleet_requests_total", path="/v1/embeddings/images", status="422") > before,
        30,
        "the refused request",
    )
    assert exported(service).keys() >= THEIRS
    page = service.metrics()
    paths = {found["path"] for found in labels(page, "ray_clipfleet_requests_total")}
    assert {"/v1/embeddings", "/v1/embeddings/images", "/v1/models/{model:path}", "none"} <= paths
    assert not any("other" in path or "such" in path for path in paths), "what clients make up is no label"


def _expressions(content: Any) -> list[str]:
    if isinstance(content, dict):
        own = [content["expr"]] if "expr" in content else []
        return own + [found for value in content.values() for found in _expressions(value)]
    return [found for value in content for found in _expressions(value)] if isinstance(content, list) else []


def asked(content: Any) -> set[str]:
    """The metrics that expressions name, without what a histogram's series have behind their name."""
    names = {name for expression in _expressions(content) for name in re.findall(r"\bray_\w+", expression)}
    suffix = re.compile(r"_(bucket|sum|count)$")
    return {suffix.sub("", name) if OURS.get(suffix.sub("", name)) == "histogram" else name for name in names}


def test_the_dashboard_shows_them_all() -> None:
    dashboard = json.loads((OPERATIONS / "grafana.json").read_text())
    assert asked(dashboard) == OURS.keys() | THEIRS
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_alerts_ask_for_what_is_there() -> None:
    rules = yaml.safe_load((OPERATIONS / "alerts.yaml").read_text())
    assert asked(rules) <= OURS.keys() | THEIRS
    for rule in rules["groups"][0]["rules"]:
        assert rule["alert"].startswith("Clipfleet") and rule["annotations"]["summary"]


def test_the_page_of_metrics_lists_them() -> None:
    page = Path(ROOT / "docs" / "configuration.md").read_text()
    assert all(f"`{name.removeprefix('ray_')}`" in page for name in OURS)


def test_a_request_has_a_name_in_its_answer(http: httpx.Client) -> None:
    """Its own, or one that Serve gives it; once."""

    def names(**headers: str) -> list[str]:
        return http.post("/v1/embeddings", json={"input": []}, headers=headers).headers.get_list("X-Request-Id")

    assert names(**{"X-Request-Id": "shop-42/a"}) == ["shop-42/a"]
    made = [*names(), *names()]
    assert len(set(made)) == 2 and all(re.fullmatch("[0-9a-f-]{32,36}", name) for name in made)
    for long in ("x" * 129, ",".join(["x" * 100] * 2), "two words"):
        assert names(**{"X-Request-Id": long}) != [long]
