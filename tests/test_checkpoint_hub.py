"""Checkpoints by hub id: from the local cache, from a hub, and clear errors where there is neither."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import cache_as, copy_tiny, make_clip
from tests.hub import Hub, pull_request, serve

ROOT = Path(__file__).parent.parent
MAIN, CONVERTED, OTHER = "1" * 40, "2" * 40, "3" * 40

FIND = """
import sys
from clipfleet.checkpoint import find_checkpoint
from clipfleet.errors import ClipfleetError
try:
    found = find_checkpoint(sys.argv[1], weights=sys.argv[2:] != ["no-weights"])
    print(found.revision, found.served_name, sorted(file.name for file in found.folder.iterdir()))
except ClipfleetError as error:
    print(type(error).__name__, error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def find(name: str, home: Path, *options: str, **environment: str) -> str:
    """What find_checkpoint says in a child whose hub cache is under `home`; offline if not told otherwise."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", FIND, name, *options],
        cwd=ROOT, env={**inherited, **settings}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_id_is_found_in_the_cache_at_its_revision(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    cache_as(tmp_path / "hub", "org/model", checkpoints["clip"], sha=MAIN, refs=("main",))
    cache_as(tmp_path / "hub", "org/model", checkpoints["siglip"], sha=OTHER, refs=("v2",))
    assert find("org/model", tmp_path).startswith(f"{MAIN} org/model ")
    assert find("org/model@main", tmp_path).startswith(f"{MAIN} org/model@main ")
    assert find("org/model@v2", tmp_path).startswith(f"{OTHER} org/model@v2 ")
    assert find(f"org/model@{OTHER}", tmp_path).startswith(f"{OTHER} ")


def test_a_hub_that_cannot_be_reached_is_named_with_the_cause_and_tiny(tmp_path: Path) -> None:
    message = find("openai/clip-vit-base-patch32", tmp_path)
    assert message.startswith("CheckpointNotFound checkpoint 'openai/clip-vit-base-patch32' is not in the local hub")
    assert "HF_HUB_OFFLINE" in message and message.endswith("--model tiny")
    assert "'org/model@v1'" in find("org/model@v1", tmp_path)


def test_a_hub_that_refuses_connections_is_the_cause(tmp_path: Path) -> None:
    message = find("org/model", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("CheckpointNotFound checkpoint 'org/model'") and message.endswith("--model tiny")


def hub_of_pickles(tmp_path: Path, **options: Any) -> Hub:
    """A repository as openai's: pickled weights on main, converted ones in the bot's pull request."""
    converted = copy_tiny(tmp_path / "converted")
    shutil.copytree(converted, tmp_path / "main")
    (tmp_path / "main" / "model.safetensors").rename(tmp_path / "main" / "pytorch_model.bin")
    settings: dict[str, Any] = {"pull_requests": [pull_request(7)], "history": {"refs/pr/7": [CONVERTED, MAIN]}}
    return Hub(
        "org/model",
        commits={MAIN: tmp_path / "main", CONVERTED: converted},
        names={"main": MAIN, "refs/pr/7": CONVERTED},
        **{**settings, **options},
    )


def test_converted_weights_are_found_in_the_bots_pull_request_and_later_offline(tmp_path: Path) -> None:
    with serve(hub_of_pickles(tmp_path)) as hub:
        found = find("org/model", tmp_path / "home", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
        assert found.startswith(f"{CONVERTED} org/model ") and "'model.safetensors'" in found
        assert not any("pytorch_model.bin" in request for request in hub.requests), "pickles are not even downloaded"
    assert find("org/model", tmp_path / "home") == found


@pytest.mark.parametrize(
    "options",
    [
        {"pull_requests": []},
        {"pull_requests": [pull_request(7, status="closed")]},
        {"pull_requests": [pull_request(7, author={"name": "somebody"})]},
        {"pull_requests": [pull_request(7, title="Use these weights instead")]},
        {"history": {"refs/pr/7": [CONVERTED, OTHER, MAIN]}},
        {"history": {"refs/pr/7": [CONVERTED, OTHER]}},
    ],
    ids=["none", "closed", "another author", "another title", "more than one commit", "of another commit"],
)
def test_any_other_pull_request_is_not_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    with serve(hub_of_pickles(tmp_path, **options)) as hub:
        message = find("org/model", tmp_path / "home", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
    assert message.startswith("CheckpointUnsupported checkpoint 'org/model' has no model.safetensors")
    assert "ID@REVISION" in message


def test_a_decoder_downloads_no_weights(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "clip")
    with serve(Hub("org/model", commits={MAIN: folder}, names={"main": MAIN})) as hub:
        found = find("org/model", tmp_path / "home", "no-weights", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
        assert found.startswith(f"{MAIN} ") and "config.json" in found
        assert not any("model.safetensors" in request for request in hub.requests)
        assert "'model.safetensors'" in find("org/model", tmp_path / "home", HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
