"""Train the embedded checkpoint: `python scripts/train_tiny_clip.py clipfleet/checkpoints/tiny`.

A CLIP of 1.3 million parameters learns the pictures of draw_shapes.py. The loss is CLIP's own over
whole captions, plus the cross-entropy of each picture against the labels present in its batch
(without it, captions that differ in the background alone pull equal labels apart). The same seed draws
the same pictures, captions and weights; floating-point sums may still differ between machines.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from draw_shapes import COLOURS, LABELS, draw
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

IMAGE_SIZE = 224
CONTEXT_LENGTH = 77
PEAK_LEARNING_RATE = 1.2e-3
# What a person may type around a label; the model must not care.
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a drawing of a {}", "an image of a {}", "the {}")
GROUND = " on a {} background"


class Batch(NamedTuple):
    """One step's pictures, captions and labels."""

    pixels: np.ndarray  # (B, 224, 224, 3) uint8
    captions: list[str]
    labels: list[str]


def _pixels(rng: random.Random) -> tuple[np.ndarray, str, str]:
    # Half at the final size (hard edges), half larger and scaled down (soft edges), as real files arrive.
    size = rng.choice((IMAGE_SIZE, rng.randint(IMAGE_SIZE // 2, 2 * IMAGE_SIZE)))
    drawing = draw(rng, (size, size))
    ground = drawing.caption.split(" on a ")[1].split(" ")[0]
    return np.asarray(drawing.image.resize((IMAGE_SIZE, IMAGE_SIZE), 3)), drawing.label, ground


def make_batch(seed: int, size: int) -> Batch:
    """Draw the batch that belongs to `seed`."""
    rng = random.Random(seed)
    pictures = [_pixels(rng) for _ in range(size)]
    captions = [
        rng.choice(TEMPLATES).format(label) + (GROUND.format(ground) if rng.random() < 0.6 else "")
        for _, label, ground in pictures
    ]
    return Batch(np.stack([pixels for pixels, _, _ in pictures]), captions, [label for _, label, _ in pictures])


def batches(steps: int, size: int, seed: int, workers: int) -> Iterator[Batch]:
    """Yield the batches of a run in order, drawn ahead by `workers` processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        ahead = [pool.submit(make_batch, seed * 1_000_003 + step, size) for step in range(min(steps, 4 * workers))]
        for step in range(steps):
            batch = ahead.pop(0).result()
            following = step + 4 * workers
            if following < steps:
                ahead.append(pool.submit(make_batch, seed * 1_000_003 + following, size))
            yield batch


def train_tokenizer(out: Path) -> CLIPTokenizer:
    """Byte-level BPE over the captions, in CLIP's own scheme: any other text falls back to its bytes."""
    corpus = [
        template.format(label) + ground
        for template in TEMPLATES
        for label in LABELS
        for ground in ("", *(GROUND.format(colour) for colour in COLOURS))
    ]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    learned, merges = trained.model.save(str(out))
    merge_rules: Any = [tuple(line.split(" ")) for line in Path(merges).read_text().splitlines()[1:]]
    words = json.loads(Path(learned).read_text())
    Path(learned).unlink()
    Path(merges).unlink()
    # Bytes alone and bytes that end a word must all be known, or a rare byte would become "unknown".
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [word for word, _ in sorted(words.items(), key=lambda item: item[1]) if word not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merge_rules, model_max_length=CONTEXT_LENGTH)
    tokenizer.save_pretrained(out)
    return tokenizer


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 512}
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={
            **tower, **tokens, "num_hidden_layers": 2,
            "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH,
        },
        vision_config={**tower, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 32},
        projection_dim=512,
    )  # fmt: skip
    return CLIPModel(config)


def contrastive_loss(scores: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy; scores (B, B), pairs on the diagonal."""
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


class Trainer:
    """One model, its tokenizer and the two losses."""

    def __init__(self, tokenizer: CLIPTokenizer, device: str) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.model: Any = make_model(tokenizer)
        self.model.to(device)
        processor = CLIPImageProcessorPil()
        self.mean = torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)

    def images(self, pixels: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        return F.normalize(self.model.get_image_features(pixel_values=(batch - self.mean) / self.std).pooler_output)

    def texts(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output)

    def loss(self, batch: Batch) -> torch.Tensor:
        scale = self.model.logit_scale.exp().clamp(max=100)
        images = self.images(batch.pixels)  # (B, 512)
        captions = contrastive_loss(scale * images @ self.texts(batch.captions).T)
        present = sorted(set(batch.labels))
        target = torch.tensor([present.index(label) for label in batch.labels], device=self.device)
        labels = F.cross_entropy(scale * images @ self.texts(present).T, target)
        return captions + labels

    @torch.no_grad()
    def accuracy(self, seed: int, count: int = 480) -> float:
        """Share of fresh drawings whose nearest of all labels is their own."""
        self.model.eval()
        batch = make_batch(seed, count)
        nearest = (self.images(batch.pixels) @ self.texts(list(LABELS)).T).argmax(1).tolist()
        self.model.train()
        return sum(LABELS[i] == label for i, label in zip(nearest, batch.labels, strict=True)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=160)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(train_tokenizer(arguments.out), arguments.device)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=arguments.steps)

    started = time.monotonic()
    drawn = batches(arguments.steps, arguments.batch_size, arguments.seed + 1, arguments.workers)
    for step, batch in enumerate(drawn, start=1):
        optimizer.zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == arguments.steps:
            accuracy = trainer.accuracy(seed=-1 - arguments.seed)
            minutes = (time.monotonic() - started) / 60
            print(f"step {step}  loss {loss.item():.3f}  accuracy {accuracy:.3f}  {minutes:.1f} min", flush=True)

    with torch.no_grad():
        trainer.model.logit_scale.clamp_(max=math.log(100))
    trainer.model.eval().cpu().save_pretrained(arguments.out)
    CLIPImageProcessorPil().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
