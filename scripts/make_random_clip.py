"""Write a full-size ViT-B/32 with random weights: `python scripts/make_random_clip.py OUT [--seed N] [--layers N]`.

For benchmarks and tests where the size of the model matters and its answers do not. The numbers are those of
openai/clip-vit-base-patch32; the tokenizer is the embedded checkpoint's, whose ids lie within that vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

TINY = Path(__file__).parent.parent / "clipfleet" / "checkpoints" / "tiny"


def make_config(tokenizer: CLIPTokenizer, layers: int = 12) -> CLIPConfig:
    """openai/clip-vit-base-patch32's architecture, with the special tokens of `tokenizer`; `layers` of each tower."""
    return CLIPConfig(
        projection_dim=512,
        text_config={
            "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": layers,
            "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 512,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": layers,
            "image_size": 224, "patch_size": 32, "projection_dim": 512,
        },
    )  # fmt: skip


@torch.no_grad()
def widen(model: CLIPModel) -> None:
    """Double the layers' matrices: as initialised, pictures of different things have a cosine of 0.9993."""
    for name, weight in model.named_parameters():
        if "encoder" in name and weight.ndim > 1:
            weight.mul_(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=12, help="of each tower; fewer make a smaller model")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY)
    model = CLIPModel(make_config(tokenizer, arguments.layers)).eval()
    widen(model)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    CLIPImageProcessorPil().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
