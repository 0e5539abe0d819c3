"""The loop that users write: transformers' processor and CLIPModel, 32 files at a time, no gradients.

A program of the protocol in benchmarks/programs.py: `python plain_loop.py CHECKPOINT FILE...`.
"""

import json
import sys
import time

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

BATCH = 32

checkpoint, *files = sys.argv[1:]
torch.set_num_threads(2)
model = CLIPModel.from_pretrained(checkpoint).eval()
processor = CLIPProcessor.from_pretrained(checkpoint)


def embed(paths: list[str]) -> torch.Tensor:
    vectors = []
    for start in range(0, len(paths), BATCH):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
        with torch.no_grad():
            output = model.get_image_features(**processor(images=images, return_tensors="pt"))
        vectors.append(output if isinstance(output, torch.Tensor) else output.pooler_output)
    found = torch.cat(vectors)
    return found / found.norm(dim=-1, keepdim=True)


embed(files[:BATCH])
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    started = time.perf_counter()
    found = embed(files[: asked["count"]])
    seconds = time.perf_counter() - started
    if asked["out"]:
        np.save(asked["out"], found.numpy())
    print(json.dumps({"seconds": seconds}), flush=True)
