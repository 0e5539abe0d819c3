"""`clipfleet plan`: what follows from measured rates, and a config file that the service accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from clipfleet.config_file import check_config, read_config
from clipfleet.plan import Plan, Prices, Rates, best_batch
from tests.test_cli import run

RATES = Rates(
    decode_s=0.02, image_bytes=300_000, failed=0, encode={1: 10.0, 8: 38.0, 16: 40.0, 32: 30.0},
    texts={1: 90.0, 8: 300.0, 32: 310.0}, device="cpu", engine="openvino", threads=4,
)  # fmt: skip


def plan(**changes: object) -> Plan:
    values = {
        "model": "tiny", "precision": "float32", "reduced_jpeg": False, "rates": RATES, "transport": 400.0, "transport_s": 0.04,
        "cores": 16, "gpus": 0, "prices": Prices(core=0.05),
    }  # fmt: skip
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def test_the_smallest_batch_that_comes_close_to_the_best() -> None:
    assert best_batch(RATES.encode) == 8
    assert best_batch({1: 5.0}) == 1


def test_what_one_encoder_needs_and_costs() -> None:
    found = plan()
    assert found.decoders == pytest.approx(38 * 0.02)
    busy = 38 * 0.02 + 38 * 0.04 + 4  # decoding, transport, its own threads
    assert found.cores_per_encoder == pytest.approx(busy)
    assert found.million() == pytest.approx(busy * 0.05 * 1e6 / 38 / 3600)
    assert plan(prices=Prices()).million() is None
    assert "0.76 cores that decode" in str(found) and "38.0 images/s in batches of 8" in str(found)
    assert "A million images take 7.3 hours" in str(found)
    assert "A million images take 8.3 minutes" in str(plan(rates=replace(RATES, encode={64: 2000.0})))


def test_as_json() -> None:
    printed = json.loads(json.dumps(plan().as_json()))
    assert printed["batch"] == 8 and printed["images_per_second"] == 2 * 38 and printed["encode"]["8"] == 38
    check_config(yaml.safe_load(printed["config"]), "what was printed")


def test_what_the_machine_should_serve() -> None:
    found = plan()
    assert found.encoders == 2 and found.machine_rate == 2 * 38
    small = plan(cores=2)
    assert small.encoders == 1
    assert small.machine_rate == pytest.approx(2 / (0.02 + 0.04 + 4 / 38)), "cores by their seconds an image"
    assert f"This machine (16 cores) should serve {found.machine_rate:.0f} images/s" in str(found)
    fast = replace(RATES, encode={64: 2000.0}, device="cuda")
    assert plan(rates=fast, gpus=1).machine_rate == pytest.approx(16 / (0.02 + 0.04)), "decoding is what ends first"
    slow = plan(rates=replace(RATES, device="cuda"), gpus=2)
    assert slow.machine_rate == 2 * 38 and "16 cores, 2 GPUs" in str(slow)


@pytest.mark.parametrize("cores", [1, 2, 8, 64])
@pytest.mark.parametrize("reduced", [False, True])
def test_its_config_is_accepted_and_finds_room(cores: int, reduced: bool) -> None:
    config = yaml.safe_load(plan(cores=cores, reduced_jpeg=reduced).config())
    check_config(config, "plan")
    application = config["applications"][0]
    assert application["args"].get("reduced_jpeg", False) is reduced
    reserved = 0.0
    for deployment in application["deployments"]:
        share = deployment.get("ray_actor_options", {}).get("num_cpus", application["args"]["cpus_per_replica"])
        reserved += share * deployment["autoscaling_config"]["max_replicas"]
    assert 0 < reserved <= cores


def test_there_are_ingresses_for_what_it_serves() -> None:
    fast = replace(RATES, encode={64: 2000.0}, device="cuda")  # 267 images/s from 16 cores
    config = yaml.safe_load(plan(rates=fast, gpus=1, transport=100.0).config())
    scaling = {part["name"]: part["autoscaling_config"] for part in config["applications"][0]["deployments"]}["Ingress"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 3)


def test_on_a_gpu_both_encoders_share_it() -> None:
    config = yaml.safe_load(plan(rates=replace(RATES, device="cuda", engine="torch"), gpus=1, cores=4).config())
    check_config(config, "plan")
    arguments = config["applications"][0]["args"]
    assert (arguments["device"], arguments["gpus_per_replica"]) == ("cuda", 0.5)
    assert "threads_per_replica" not in arguments


def test_the_command_measures_and_writes_a_config(tmp_path: Path, picture_files: list[Path]) -> None:
    out = tmp_path / "plan.yaml"
    done = run("plan", picture_files[0].parent, "--model", "tiny", "--core-price", "0.04", "--out", out)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("decode", "encode", "texts", "transport", "A million images"))
    assert read_config(str(out))["applications"][0]["args"]["model"] == "tiny"


def test_a_source_without_images(tmp_path: Path) -> None:
    done = run("plan", tmp_path, "--model", "tiny")
    assert done.returncode == 1 and "holds no images" in done.stderr and "Traceback" not in done.stderr
