"""Every Python block of the seed page (tests/data/seed-clip-module.md, unchanged) runs as it is written.

Outside of the blocks stand: the picture files that they name, a hub cache with random weights under the ids
that they name, and the names that they take for granted (run_blocks.stand_ins).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import cache_as, make_clip

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "tests" / "data" / "seed-clip-module.md"
PICTURES = [
    "path/to/image.jpg", "path/to/image1.jpg", "path/to/image2.jpg", "path/to/image3.jpg",
    "car.jpg", "sofa.jpg", "table.jpg", "image.jpg", "good.jpg", "good2.jpg", "large_image.jpg", "product1.jpg",
]  # fmt: skip


def blocks() -> dict[str, str]:
    """The page's Python blocks by the heading above them."""
    found: dict[str, str] = {}
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        title, language, source = match.groups()
        if title:
            heading = title.split("(")[0].strip("`_ ")
        elif language == "python":
            found[heading] = source
    return found


BLOCKS = blocks()
QDRANT = "Qdrant Example"
# In memory where the block has a server, and as a server reads points: in local mode the client takes no dicts.
IN_MEMORY = """
import qdrant_client
from qdrant_client.models import PointsList

class InMemory(qdrant_client.QdrantClient):
    def __init__(self, host, port):
        super().__init__(":memory:")

    def upsert(self, collection_name, points):
        return super().upsert(collection_name, PointsList(points=points).points)

qdrant_client.QdrantClient = InMemory
"""
# `search` was removed from the package; this is the call that replaced it.
REPLACED = {"results = client.search(": "results = client.query_points(", "query_vector=": "query="}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> dict[str, dict[str, Any]]:
    """What came of each block: all of them run in one child process that cannot reach the hub."""
    home = tmp_path_factory.mktemp("huggingface")
    for hub_id, dimension in (("openai/clip-vit-base-patch32", 512), ("openai/clip-vit-large-patch14", 768)):
        folder = tmp_path_factory.mktemp("random") / "clip"
        make_clip(folder, dimension=dimension, image_size=224, patch_size=32, context_length=77)
        cache_as(home / "hub", hub_id, folder)
    jobs = []
    for name, source in BLOCKS.items():
        if name == QDRANT:
            for old, new in REPLACED.items():
                assert source.count(old) == 1
                source = source.replace(old, new)
            source = f"{IN_MEMORY}{source}found = [point.payload['image_path'] for point in results.points]\n"
        folder = tmp_path_factory.mktemp("block")
        (folder / "path" / "to").mkdir(parents=True)
        for number, name in enumerate(PICTURES):
            pictures[number].save(folder / name)
        (folder / "corrupted.jpg").write_bytes((folder / "car.jpg").read_bytes()[:200])
        jobs.append({"source": source, "folder": str(folder)})
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_blocks"],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=240, cwd=jobs[0]["folder"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = [{**outcome, **job} for outcome, job in zip(json.loads(done.stdout), jobs, strict=True)]
    return dict(zip(BLOCKS, outcomes, strict=True))


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == PAGE.read_text("utf-8").count("```python") == 21
    assert {name for name in BLOCKS if "qdrant" in BLOCKS[name]} == {QDRANT}


def test_the_qdrant_block_finds_what_it_indexed(results: dict[str, dict[str, Any]]) -> None:
    """product2.jpg is not there, as in other blocks files are missing."""
    assert results[QDRANT]["raised"] == []
    assert ["found", ["product1.jpg"]] in results[QDRANT]["assigned"]


def expected_error(statement: str) -> tuple[str, str] | None:
    """The errors that the page itself announces, and the GPU that this machine may lack."""
    if "nonexistent.jpg" in statement:
        return "FileNotFoundError", r"nonexistent\.jpg"
    if "device='cuda'" in statement and not torch.cuda.is_available():
        return "DeviceUnavailable", "'cuda' is not available.*'auto'"
    return None


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs_unedited(results: dict[str, dict[str, Any]], name: str) -> None:
    for error in results[name]["raised"]:
        expected = expected_error(error["statement"])
        assert expected is not None, error
        assert expected[0] in error["kinds"] and re.search(expected[1], error["message"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["Initialize the Embedder", "2. GPU Acceleration"])
def test_cuda_is_the_one_statement_that_fails_without_a_gpu(results: dict[str, dict[str, Any]], name: str) -> None:
    assert [error["statement"] for error in results[name]["raised"]] == ["embedder = CLIPEmbedder(device='cuda')"]


def test_single_image_prints_what_its_comments_say(results: dict[str, dict[str, Any]]) -> None:
    shape, norm = results["Single Image Embedding"]["printed"].splitlines()
    assert shape == "Shape: (512,)" and float(norm.removeprefix("Norm: ")) == pytest.approx(1, abs=1e-5)


def test_batch_prints_each_image(results: dict[str, dict[str, Any]]) -> None:
    assert results["Batch Image Embeddings"]["printed"].splitlines() == [f"Image {i}: (512,)" for i in range(3)]


def test_texts_print_what_their_comments_say(results: dict[str, dict[str, Any]]) -> None:
    assert results["Text Encoding"]["printed"].splitlines() == ["(512,)", "(3, 512)"]


def test_search_prints_falling_similarities(results: dict[str, dict[str, Any]]) -> None:
    lines = [line.split(": ") for line in results["Similarity Search"]["printed"].splitlines()]
    assert sorted(path for path, _ in lines) == ["car.jpg", "sofa.jpg", "table.jpg"]
    scores = [float(score) for _, score in lines]
    assert scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)


def test_reference_examples_leave_what_the_page_says(results: dict[str, dict[str, Any]]) -> None:
    assert results["async generate_embedding"]["assigned"] == [["embedding", [512]]]
    assert results["async generate_embeddings_batch"]["assigned"] == [["embeddings", [[512]] * 3]]
    assert results["encode_text"]["assigned"] == [["embedding", [512]], ["embeddings", [2, 512]]]
    assert type(dict(results["compute_similarity"]["assigned"])["similarity"]) is float
    assert results["get_embedding_dimension"]["assigned"] == [["dim", 512]]


def test_error_handling_does_what_its_comments_say(results: dict[str, dict[str, Any]]) -> None:
    outcome = results["Error Handling"]
    assert [error["statement"] for error in outcome["raised"]] == [
        "embedding = await embedder.generate_embedding('nonexistent.jpg')"
    ]
    assert outcome["assigned"] == [["embeddings", [[512], None, [512]]], ["embeddings", []]]


def test_logging_block_writes_its_file(results: dict[str, dict[str, Any]]) -> None:
    written = (Path(results["Logging"]["folder"]) / "clip_embedder.log").read_text()
    assert "INFO" in written and "SUCCESS" in written and "openai/clip-vit-base-patch32" in written


def test_legacy_class_works_and_is_deprecated(results: dict[str, dict[str, Any]]) -> None:
    assert ["embedding", [512]] in results["Backward Compatibility"]["assigned"]
    assert any(note.startswith("DeprecationWarning: CLIPModel") for note in results["Backward Compatibility"]["warned"])
