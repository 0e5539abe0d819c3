"""Config files: what is checked before Ray starts, and that the files we ship pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipfleet.config_file import DEPLOYMENTS, check_config, read_config
from clipfleet.errors import SettingsError

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "serve_config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
DEMO = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())


def application(config: dict[str, Any]) -> dict[str, Any]:
    return config["applications"][0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_we_ship_are_good_and_name_every_deployment(file: Path) -> None:
    config = read_config(str(file))
    assert tuple(d["name"] for d in application(config)["deployments"]) == DEPLOYMENTS


@pytest.mark.parametrize("name", ["autoscale", "gpu", "serve_config"])
def test_autoscaling_of_every_deployment_stands_in_the_file(name: str) -> None:
    for deployment in application(read_config(name))["deployments"]:
        assert {"min_replicas", "max_replicas", "target_ongoing_requests"} <= set(deployment["autoscaling_config"])


@pytest.mark.parametrize("name", ["demo", "autoscale"])
def test_small_configs_reserve_at_most_one_cpu_at_their_largest(name: str) -> None:
    ours = application(read_config(name))
    reserved = 0.0
    for deployment in ours["deployments"]:
        replicas = deployment.get("autoscaling_config", {}).get("max_replicas") or deployment["num_replicas"]
        options = deployment.get("ray_actor_options") or {"num_cpus": ours["args"]["cpus_per_replica"]}
        reserved += replicas * options["num_cpus"]
    assert reserved <= 1.0 + 1e-9


@pytest.mark.parametrize("source", ["demo", "demo.yaml", "configs/demo.yaml", str(ROOT / "configs" / "demo.yaml")])
def test_a_packaged_file_is_found_by_name_from_anywhere(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_config(source) == DEMO


def test_what_is_not_there_names_what_is() -> None:
    with pytest.raises(SettingsError, match="'nothing'; packaged ones are autoscale, demo, gpu, serve_config"):
        read_config("nothing")


@pytest.mark.parametrize(
    "text", ["", "[]", "text", "{applications: 7}", "{applications: []}", "a: [", "\x00", "{applications: [{name: x}]}"]
)
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"wrong\.yaml"):
        read_config(str(file))


@pytest.mark.parametrize(
    ("deployment", "more", "words"),
    [
        ("ImageEncoder", {"max_ongoing_requests": 16}, ["max_ongoing_requests 16", "max_batch_size 32"]),
        (
            "TextEncoder",
            {"autoscaling_config": {"max_replicas": 2, "target_ongoing_requests": 8}},
            ["target_ongoing_requests 8", "max_batch_size 32"],
        ),
        # Serve's own default is 2.
        ("TextEncoder", {"autoscaling_config": {"max_replicas": 2}}, ["target_ongoing_requests 2", "max_batch_size 32"]),
        ("ImageEncoder", {"num_replicas": "auto"}, ["target_ongoing_requests 2", "max_batch_size 32"]),
        (
            "ImageDecoder",
            {"max_ongoing_requests": 4, "autoscaling_config": {"target_ongoing_requests": 8}},
            ["target_ongoing_requests 8", "max_ongoing_requests 4"],
        ),
        ("Ingress", {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, ["min_replicas 3", "max_replicas 2"]),
        ("ImageEncoder", {"ray_actor_options": {"num_gpus": 1}}, ["ray_actor_options", "gpus_per_replica"]),
        ("ImageEncoder", {"user_config": {"max_batch": 8}}, ["user_config.max_batch", "no such setting"]),
        ("ImageEncoder", {"user_config": {"max_batch_size": 0}}, ["user_config.max_batch_size", "0"]),
        ("ImageEncoder", {"user_config": {"batch_wait_timeout_s": -1}}, ["batch_wait_timeout_s", "-1"]),
        ("ImageEncoder", {"user_config": 7}, ["user_config", "7"]),
        ("ImageEncoder", {"max_ongoing_requests": "many"}, ["max_ongoing_requests", "many"]),
        ("ImageDecoder", {"autoscaling_config": {"target_ongoing_requests": "few"}}, ["target_ongoing_requests", "few"]),
        ("Ingress", {"autoscaling_config": "auto"}, ["autoscaling_config", "auto"]),
        ("Ingress", {"num_replicas": -1}, ["num_replicas"]),
        ("Decoder", {}, ["'Decoder'", "ImageDecoder"]),
    ],
)  # fmt: skip
def test_contradictions_are_named(deployment: str, more: dict[str, Any], words: list[str]) -> None:
    config = copy.deepcopy(DEMO)
    listed = application(config)["deployments"]
    entry = next((d for d in listed if d["name"] == deployment), None)
    if entry is None:
        listed.append({"name": deployment, **more})
    else:
        if "autoscaling_config" in more:
            entry.pop("num_replicas", None)
        entry.update(more)
    with pytest.raises(SettingsError) as refused:
        check_config(config, "demo")
    assert all(word in refused.value.message for word in words), refused.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"http_options": "x"},
        {"http_options": {"port": 70_000}},
        {"applications": ["clipfleet"]},
        {"applications": [{"import_path": "a:b"}]},
        {"applications": [{"name": "clipfleet", "import_path": "deployments.graph:build", "deployments": 5}]},
        {"applications": [{"name": "clipfleet", "import_path": "deployments.graph:build", "args": [1]}]},
    ],
)
def test_files_of_a_wrong_form_are_one_error(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="config 'mine'"):
        check_config({**copy.deepcopy(DEMO), **change}, "mine")


@pytest.mark.parametrize(
    ("deployment", "word"),
    [
        ({"name": "ImageEncoder"}, "listed twice"),
        ({"name": "TextEncoder", "num_replicas": 0}, "num_replicas"),
        ({"name": "TextEncoder", "user_config": {"batch_wait_timeout_s": float("inf")}}, "batch_wait_timeout_s"),
        ({"name": "ImageDecoder", "user_config": {"max_batch_size": 4}}, "takes no user_config"),
        ({"name": "Ingress", "max_queued_requests": 5}, "inflight_items"),
    ],
)
def test_deployments_that_cannot_work(deployment: dict[str, Any], word: str) -> None:
    config = copy.deepcopy(DEMO)
    listed = application(config)["deployments"]
    if word != "listed twice":
        listed[:] = [entry for entry in listed if entry["name"] != deployment["name"]]
    listed.append(deployment)
    with pytest.raises(SettingsError, match=word):
        check_config(config, "mine")


@pytest.mark.parametrize("keys", ['["a-secret-key]', "[*a-secret-key]", "!a-secret-key x"])
def test_a_file_that_is_no_yaml_is_not_quoted(keys: str, tmp_path: Path) -> None:
    """The line may hold a key."""
    file = tmp_path / "broken.yaml"
    file.write_text(f"applications:\n  - args: {{api_keys: {keys}}}\n")
    with pytest.raises(SettingsError, match=r"is no YAML in line \d+, column \d+: ") as caught:
        read_config(str(file))
    assert "a-secret-key" not in caught.value.message
