"""Batches are full under load and a lone request does not wait, with a model large enough to be the bottleneck."""

from __future__ import annotations

import io
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data as photographs
from transformers import CLIPImageProcessorPil, CLIPModel

from scripts.draw_shapes import draw
from tests.deployments.processes import until
from tests.deployments.service import ROOT, Service, serving, sum_of
from tests.pictures import encode

LARGEST = 8
CLIENTS = 16


@pytest.fixture(scope="module")
def busy(random_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["applications"][0]["args"].pop("threads_per_replica")
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] == "ImageEncoder":
            deployment["user_config"] = {"max_batch_size": LARGEST}
    file = tmp_path_factory.mktemp("config") / "busy.yaml"
    file.write_text(yaml.safe_dump(config))
    # On a public address, as it asks for by --open; at the end the command is killed, and all that it started has to end.
    options = ("--model", random_clip, "--host", "0.0.0.0", "--open")
    # A forward pass is by far the slowest part, on any machine: only then are there batches to fill.
    slow = {"PYTHONPATH": str(ROOT / "faults" / "injected"), "FORWARD_S": "0.03"}
    with serving(file, *options, stop=signal.SIGKILL, **slow) as service:
        yield service


class Recorded:
    """What the exported metrics gained since the last look at them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        kinds = {
            "batches": "clipfleet_batch_size_count",
            "items": "clipfleet_batch_size_sum",
            "waited": "clipfleet_queue_wait_seconds_sum",
            "waits": "clipfleet_queue_wait_seconds_count",
            "forward": "clipfleet_forward_seconds_sum",
            "counted": "clipfleet_items_total",
        }
        page = self._service.metrics()  # of one moment
        return {name: sum_of(page, f"ray_{metric}", tower="image") for name, metric in kinds.items()}

    def gained(self, items: int) -> dict[str, float]:
        """The gain, once `items` images have arrived in all of it (Ray exports every 2 s)."""
        found: dict[str, float] = {}

        def arrived() -> bool:
            found.update({name: value - self._before[name] for name, value in self._read().items()})
            return min(found["items"], found["waits"], found["counted"]) >= items

        until(arrived, 60, f"{items} images in the metrics")
        assert found["items"] == found["waits"] == found["counted"] == items
        self._before = self._read()
        return found


def pictures() -> Iterator[bytes]:
    rng = random.Random(32)
    while True:
        yield encode(draw(rng).image, "JPEG")


def post(service: Service, body: bytes) -> np.ndarray:
    with service.client(headers={"Content-Type": "image/jpeg", "Accept": "application/x-npy"}) as http:
        answer = http.post("/v1/embeddings/images", content=body)
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))[0]


def test_lone_requests_are_batches_of_one_and_do_not_wait(busy: Service) -> None:
    recorded = Recorded(busy)
    for _, body in zip(range(8), pictures(), strict=False):
        post(busy, body)
    gained = recorded.gained(8)
    assert gained["batches"] == 8
    assert gained["waited"] < gained["forward"]


def test_under_load_batches_fill(busy: Service) -> None:
    recorded = Recorded(busy)
    bodies = [body for _, body in zip(range(128), pictures(), strict=False)]
    with ThreadPoolExecutor(CLIENTS) as clients:
        vectors = list(clients.map(lambda body: post(busy, body), bodies))
    assert len({vector.tobytes() for vector in vectors}) == 128
    gained = recorded.gained(128)
    assert gained["items"] / gained["batches"] >= 4


def test_one_requests_images_share_batches(busy: Service) -> None:
    recorded = Recorded(busy)
    files = [("files", (f"{number}.jpg", body)) for number, body in zip(count(), [next(pictures())] * 16, strict=False)]
    with busy.client() as http:
        assert http.post("/v1/embeddings/images", files=files).status_code == 200
    assert recorded.gained(16)["batches"] < 8


def test_photographs_agree_with_transformers(busy: Service, random_clip: Path) -> None:
    model = CLIPModel.from_pretrained(random_clip).eval()
    processor = CLIPImageProcessorPil.from_pretrained(random_clip)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photograph = Image.fromarray(getattr(photographs, name)())
        with torch.inference_mode():
            reference = model.get_image_features(**processor(photograph, return_tensors="pt")).pooler_output[0].numpy()
        found = post(busy, encode(photograph, "PNG"))
        assert found.shape == (512,) and np.abs(found - reference / np.linalg.norm(reference)).max() <= 1e-5
