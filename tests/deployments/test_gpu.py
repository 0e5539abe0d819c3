"""A service whose encoders share an NVIDIA GPU. Skipped where torch finds none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.deployments.processes import Process, until
from tests.deployments.service import ROOT, Service, serving
from tests.deployments.test_lifecycle import _load
from tests.library import Library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
TEXTS = ["a red circle", "a yellow star on a purple background", "?"]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """configs/demo.yaml in float16 on a GPU, with two encoders of images."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    application = config["applications"][0]
    application["args"] |= {"device": "cuda", "gpus_per_replica": 0.25, "precision": "float16"}
    next(d for d in application["deployments"] if d["name"] == "ImageEncoder")["num_replicas"] = 2
    file = tmp_path_factory.mktemp("config") / "gpu.yaml"
    file.write_text(yaml.safe_dump(config))
    with serving(file) as service:
        yield service


def _has_gpu(process: Process) -> bool:
    files = [os.readlink(file) for file in Path("/proc", str(process.pid), "fd").iterdir() if file.is_symlink()]
    return any(file.startswith("/dev/nvidia") for file in files)


def test_vectors_are_the_librarys(on_gpu: Service, files: list[bytes], library: Library) -> None:
    with on_gpu.client() as http:
        answer = http.post(
            "/v1/embeddings/images", files=[("files", (str(n), data)) for n, data in enumerate(files)]
        ).json()
        images = np.array([item["embedding"] for item in answer["data"]])
        texts = np.array(
            [item["embedding"] for item in http.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]]
        )
    assert (images * library.images(files)).sum(1).min() >= 0.9999
    assert (texts * library.texts(TEXTS)).sum(1).min() >= 0.9999


def test_encoders_alone_hold_the_gpu(on_gpu: Service) -> None:
    for deployment, count in (("ImageEncoder", 2), ("TextEncoder", 1)):
        replicas = on_gpu.replicas(deployment)
        assert len(replicas) == count and all(map(_has_gpu, replicas))
    assert not any(map(_has_gpu, on_gpu.replicas("ImageDecoder") + on_gpu.replicas("Ingress")))


def test_a_killed_encoder_fails_no_request(on_gpu: Service, files: list[bytes]) -> None:
    stop = threading.Event()
    answers: list[int | str] = []
    requests = [{"files": [("files", ("a", body))] * 16} for body in files[:8]]
    clients = [
        threading.Thread(target=_load, args=(on_gpu, stop, answers, "/v1/embeddings/images", request))
        for request in requests
    ]
    for thread in clients:
        thread.start()
    try:
        until(lambda: len(answers) > 16, 60, "answers before the kill")
        before = on_gpu.replicas("ImageEncoder")
        os.kill(before[0].pid, signal.SIGKILL)
        so_far = len(answers)
        until(lambda: len(answers) > so_far + 64, 90, "answers after the kill")
        until(lambda: len(on_gpu.replicas("ImageEncoder")) == 2, 90, "another encoder")
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert set(answers) == {200}
    assert before[0].pid not in {process.pid for process in on_gpu.replicas("ImageEncoder")}
