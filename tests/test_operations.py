"""The files for containers and Kubernetes: what can be checked without either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from clipfleet.config_file import check_config
from clipfleet.settings import service_settings

OPERATIONS = Path(__file__).parent.parent / "operations"
CONSTRAINTS = (OPERATIONS.parent / "constraints.txt").read_text()


def rayservice() -> dict[str, Any]:
    _, found = yaml.safe_load_all((OPERATIONS / "rayservice.yaml").read_text())
    return found["spec"]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", CONSTRAINTS, re.MULTILINE)
    assert found, package
    return found[1]


def test_the_rayservice_has_a_config_that_the_service_accepts() -> None:
    spec = rayservice()
    config = yaml.safe_load(spec["serveConfigV2"])
    check_config(config, "rayservice.yaml")
    args, deployments = config["applications"][0]["args"], config["applications"][0]["deployments"]
    assert spec["rayClusterConfig"]["rayVersion"] == pinned("ray")
    ingress = next(each for each in deployments if each["name"] == "Ingress")
    assert ingress["num_replicas"] >= 2, "one that dies is no gap"
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    gpus = group["maxReplicas"] * int(
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    )
    encoders = sum(e["autoscaling_config"]["max_replicas"] for e in deployments if e["name"].endswith("Encoder"))
    assert encoders * service_settings(args).gpus_per_replica <= gpus, "every encoder finds room"


def test_every_pod_has_shared_memory_and_the_keys() -> None:
    cluster = rayservice()["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
        assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"])
        names = {variable["name"] for variable in container["env"]}
        assert {"CLIPFLEET_API_KEYS", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"} <= names
        assert container["image"] == "clipfleet:gpu"


def test_the_image_has_the_targets_that_the_others_name() -> None:
    dockerfile = (OPERATIONS / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE))
    compose = yaml.safe_load((OPERATIONS / "compose.yaml").read_text())["services"]
    assert targets == {"build", "base", "cpu", "gpu"} and compose["clipfleet"]["build"]["target"] in targets
    assert compose["clipfleet"]["shm_size"] and "--host" in compose["clipfleet"]["command"]
    copied = re.findall(r"^COPY (?!--from)(\S+) ", dockerfile, re.MULTILINE)
    assert all((OPERATIONS.parent / name).exists() for name in copied)
