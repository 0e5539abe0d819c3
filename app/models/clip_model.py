"""The import path that existing code uses for the in-process embedder."""

from clipfleet.embedder import CLIPEmbedder, CLIPModel

__all__ = ["CLIPEmbedder", "CLIPModel"]
