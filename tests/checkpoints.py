"""Small checkpoints with random weights, in Hugging Face layout, for tests."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
)

from clipfleet.checkpoint import EMBEDDED
from scripts.draw_shapes import COLOURS, LABELS

TINY = EMBEDDED["tiny"]
Style = Literal["int sizes", "named sizes", "nested"]


def make_clip(
    folder: Path,
    *,
    dimension: int = 24,
    image_size: int = 64,
    patch_size: int = 16,
    context_length: int = 40,
    style: Style = "named sizes",
    seed: int = 0,
) -> Path:
    """Write a CLIP of random weights that has tiny's tokenizer; `style` is how its pixel settings are written."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        # The towers keep a projection_dim of 512 that is not used, as in LAION's files.
        text_config={**tower, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": context_length},
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
        projection_dim=dimension,
    )
    torch.manual_seed(seed)
    spread(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    if style == "nested":
        CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
    if style == "int sizes":  # as openai's files were first written
        edit_json(folder / "preprocessor_config.json", size=image_size, crop_size=image_size)
    return folder


def make_siglip(
    folder: Path,
    *,
    dimension: int = 28,
    image_size: int = 48,
    patch_size: int = 12,
    tokenizer: Literal["sentencepiece", "gemma"] = "sentencepiece",
    style: Style = "named sizes",
    seed: int = 0,
) -> Path:
    """Write a SigLIP of random weights: with "sentencepiece" as SigLIP has it, with "gemma" as fixed-size SigLIP 2."""
    folder.mkdir(parents=True, exist_ok=True)
    words = _siglip_tokenizer(folder) if tokenizer == "sentencepiece" else _gemma_tokenizer()
    tower = {
        "hidden_size": dimension, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    tokens = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = SiglipConfig(
        text_config={**tower, **tokens, "vocab_size": len(words), "max_position_embeddings": 64},
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
    )
    torch.manual_seed(seed)
    model = spread(SiglipModel(config))
    model.logit_scale.data.fill_(np.log(10.0))
    model.logit_bias.data.fill_(-5.0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    if style == "nested":
        SiglipProcessor(processor, words).save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
    return folder


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Widen the random weights, so that different inputs give clearly different vectors."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 if "embedding" in name else 1.5 * weight[0].numel() ** -0.5)
    return model.eval()


def _siglip_tokenizer(folder: Path) -> SiglipTokenizer:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_captions()),
        model_writer=file,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(file.getvalue())
    return SiglipTokenizer(str(folder / "spiece.model"))


def _gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.decoder = decoders.Replace("▁", " ")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        _captions(), trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *pieces], show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(rule) for rule in state["merges"]]
    tokenizer = GemmaTokenizer(vocab=state["vocab"], merges=merges, model_max_length=64, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def _captions() -> list[str]:
    return [f"a {label} on a {ground} background" for label in LABELS for ground in COLOURS]


def copy_tiny(folder: Path) -> Path:
    """A copy of the embedded checkpoint, to be edited or damaged."""
    return Path(shutil.copytree(TINY, folder))


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level entries of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cache_as(hub: Path, hub_id: str, folder: Path, sha: str = "0" * 40, refs: tuple[str, ...] = ("main",)) -> Path:
    """Put a checkpoint into a hub cache (`HF_HOME`/hub) as if `hub_id` had been downloaded; gives the snapshot."""
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / sha
    shutil.copytree(folder, snapshot)
    for ref in refs:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(sha)
    return snapshot
