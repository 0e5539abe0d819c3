"""clipfleet: CLIP vectors for images and texts, in process, over HTTP and in bulk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipfleet.errors import ClipfleetError

if TYPE_CHECKING:
    from clipfleet.client import AsyncClient, Client
    from clipfleet.embedder import CLIPEmbedder, CLIPModel
    from clipfleet.images import load_image
    from clipfleet.vectors import rank

__version__ = "0.1.0"
__all__ = ["AsyncClient", "CLIPEmbedder", "CLIPModel", "Client", "ClipfleetError", "load_image", "rank"]

# Names whose modules need numpy, httpx, torch or Pillow: imported when first asked for, so that the light install works
# (and so that `pytest --cov=clipfleet.embedder`, which imports this package twice, meets numpy only once).
_HOMES = {
    "CLIPEmbedder": "clipfleet.embedder",
    "CLIPModel": "clipfleet.embedder",
    "AsyncClient": "clipfleet.client",
    "Client": "clipfleet.client",
    "load_image": "clipfleet.images",
    "rank": "clipfleet.vectors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipfleet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
