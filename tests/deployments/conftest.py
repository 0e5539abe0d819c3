"""The services that tests share, and what they send to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import yaml

from clipfleet.checkpoint import find_checkpoint
from clipfleet.fingerprint import fingerprint
from clipfleet.images import decode
from clipfleet.qdrant import Collection
from deployments.tracing import EXPORTERS
from jobs.encoding import thumbnail
from tests.deployments.collector import Collector, collecting
from tests.deployments.listener import Listener, listening
from tests.deployments.service import ROOT, Service, free_ports, serving
from tests.library import Library


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    """The tiny checkpoint under configs/demo.yaml; stopped by SIGTERM, with nothing left, after this folder's tests."""
    with serving("demo") as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A client of the shared service."""
    with service.client() as client:
        yield client


@pytest.fixture(scope="package")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a file asks for a fault of other_service."""
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="package")
def image_store() -> Iterator[Listener]:
    """The one web server that other_service may fetch images from. Nobody takes its port on another address meanwhile."""
    with listening("127.0.0.9", *free_ports(1)) as server:
        yield server


PIXELS = find_checkpoint("tiny").pixels


@pytest.fixture(scope="package")
def collection(tmp_path_factory: pytest.TempPathFactory, files: list[bytes], library: Library) -> Path:
    """A Qdrant folder whose collection `drawn` has the drawn pictures, with thumbnails; their widths are 30 to 41."""
    folder, names = tmp_path_factory.mktemp("qdrant"), [f"{number:02d}.png" for number in range(len(files))]
    rows = pa.table(
        {
            "id": names,
            "uri": [f"/pictures/{name}" for name in names],
            "width": [30 + number for number in range(len(names))],
            "height": [20] * len(names),
            "error": pa.array([None] * len(names), pa.string()),
        }
    )
    with Collection(str(folder), "drawn").opened() as points:
        points.prepare(512, fingerprint(find_checkpoint("tiny")))
        points.upload(rows, library.images(files), [thumbnail(decode(file, PIXELS).pixels) for file in files])
    return folder


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What other_service sends its traces to."""
    with collecting() as server:
        yield server


@pytest.fixture(scope="package")
def other_service(flags: Path, image_store: Listener, collection: Path, collector: Collector) -> Iterator[Service]:
    """Another service of tiny: it caches images and no texts, takes 12 images a request and a forward pass of 2 s for one that
    hangs, fetches images from image_store, searches the collection, lets pages of one origin ask, traces every request, and has
    the faults of faults/injected."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["applications"][0]["args"] |= {
        "limits": {"forward_s": 2, "images_per_request": 12},
        "search": {"qdrant": str(collection), "collection": "drawn", "templates": ["{}", "a picture of {}"]},
        "cors_origins": ["https://shop.example"],
        "cache": {"text_bytes": 0, "image_bytes": 1_000_000},
        "image_urls": {"enabled": True, "ports": [image_store.port], "allowed_networks": ["127.0.0.9/32"]},
    }
    config["tracing_config"] = {"enabled": True, "exporter_import_path": EXPORTERS[0], "sampling_ratio": 1}
    file = flags / "other.yaml"
    file.write_text(yaml.safe_dump(config))
    variables = {
        "PYTHONPATH": str(ROOT / "faults" / "injected"),
        "FAULTS": str(flags),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds
    }
    with serving(file, **variables) as running:
        yield running
