"""The checkpoints on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from clipfleet.checkpoint import EMBEDDED, MODEL_TYPES


def offline_models() -> Iterator[dict[str, Any]]:
    """The checkpoints that load without a network: the embedded ones and those in the hub's cache."""
    for name, folder in EMBEDDED.items():
        yield {"id": name, "revision": None, "folder": str(folder)}
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ModuleNotFoundError:  # the light install
        return
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repository in sorted(cache.repos, key=lambda found: found.repo_id):
        for revision in repository.revisions:
            if repository.repo_type == "model" and _is_clip(revision.snapshot_path):
                yield {
                    "id": repository.repo_id,
                    "revision": revision.commit_hash,
                    "folder": str(revision.snapshot_path),
                }


def _is_clip(folder: Any) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") in MODEL_TYPES and any(folder.glob("model*.safetensors"))
