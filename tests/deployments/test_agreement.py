"""Library, service and offline job give the same vectors, because they run the same code."""

from __future__ import annotations

import asyncio
import io
import random
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from clipfleet import CLIPEmbedder
from scripts.draw_shapes import LABELS, draw
from tests.deployments.processes import private_folder
from tests.deployments.service import BIN, Service, running
from tests.deployments.test_isolation import least_difference

COUNT = 50


def _job(pictures: Path, dest: Path) -> dict[str, np.ndarray]:
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "embed", pictures, dest, "--model", "tiny", folder=folder) as command,
    ):
        assert command.wait(120) == 0, command.err
    table = pq.read_table(dest)
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return dict(zip(table.column("id").to_pylist(), vectors, strict=True))


def test_fifty_images_and_texts_three_ways(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = random.Random(50)
    for number in range(COUNT):
        kind = ("png", "jpg", "webp", "gif", "bmp")[number % 5]
        draw(rng).image.save(folder / f"{number:02d}.{kind}")
    files = sorted(folder.iterdir())
    texts = [*LABELS, "etwas anderes", "word " * 200]
    assert (len(files), len(texts)) == (COUNT, COUNT)

    with CLIPEmbedder("tiny", device="cpu") as embedder:
        images = np.stack([v for v in asyncio.run(embedder.generate_embeddings_batch(files)) if v is not None])
        library = np.concatenate([images, embedder.encode_text(texts)])
    assert library.shape == (2 * COUNT, 512)
    assert least_difference(library) > 1e-3  # so that a swapped vector fails below

    with service.client(headers={"Accept": "application/x-npy"}) as http:
        answer = http.post("/v1/embeddings/images", files=[("files", (f.name, f.read_bytes())) for f in files])
        served_images = np.load(io.BytesIO(answer.content))
        rows = http.post("/v1/embeddings", json={"input": texts}).json()["data"]
    served = np.concatenate([served_images, np.array([row["embedding"] for row in rows], np.float32)])
    job = _job(folder, tmp_path / "vectors")

    assert np.abs(served - library).max() <= 1e-5
    assert np.abs(np.stack([job[file.name] for file in files]) - library[:COUNT]).max() <= 1e-5


def test_the_command_encodes_the_same(service: Service, tmp_path: Path) -> None:
    command = [BIN / "clipfleet", "encode", "--model", "tiny", "--text", "a red circle", "--out", tmp_path / "v.npy"]
    subprocess.run([str(part) for part in command], check=True, timeout=120)
    with service.client() as http:
        served = http.post("/v1/embeddings", json={"input": "a red circle"}).json()["data"][0]["embedding"]
    assert np.abs(np.load(tmp_path / "v.npy")[0] - np.array(served)).max() <= 1e-5
