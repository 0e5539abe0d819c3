"""What transformers itself makes of images and texts; vectors and pixels are compared with this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from clipfleet.checkpoint import PixelSpec, parse_pixel_spec

Processor = CLIPImageProcessorPil | SiglipImageProcessorPil

CLIP = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
CLIP_WIDE = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 31, "width": 57})
SIGLIP = SiglipImageProcessorPil(size={"height": 48, "width": 48})


def spec_of(processor: Processor) -> PixelSpec:
    """Our reading of the reference's own settings."""
    return parse_pixel_spec(processor.to_dict(), "clip")


def reference_pixels(image: Image.Image, processor: Processor) -> np.ndarray:
    """The reference's pixels (H, W, 3) uint8, before it scales and normalises them."""
    output = processor(image, do_rescale=False, do_normalize=False, return_tensors="np", input_data_format=None)
    pixels = output["pixel_values"][0]  # (3, H, W)
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


class Reference:
    """A checkpoint as its own transformers model and processor, float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
        assert type(self.processor.image_processor).__name__.endswith("Pil")

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> np.ndarray:
        """Unit vectors (n, d), one image at a time."""
        return np.concatenate([
            _unit(self.model.get_image_features(**self.processor(images=image, return_tensors="pt")))
            for image in images
        ])  # fmt: skip

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors (n, d), one text at a time."""
        kind, context = self.model.config.model_type, self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length" if kind == "siglip" else False, "truncation": True, "max_length": context}
        return np.concatenate([
            _unit(self.model.get_text_features(**self.processor(text=[text], return_tensors="pt", **options)))
            for text in texts
        ])  # fmt: skip


def _unit(output: Any) -> np.ndarray:
    vectors = output.pooler_output  # already projected
    return (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
