"""Checkpoints by name and folder, how they want their pixels, and what is refused with which words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from clipfleet.checkpoint import PixelSpec, find_checkpoint, parse_pixel_spec
from clipfleet.encoder import Encoder
from clipfleet.errors import CheckpointNotFound, CheckpointUnsupported
from tests.checkpoints import TINY, copy_tiny, edit_json

CLIP_224 = parse_pixel_spec(CLIPImageProcessorPil().to_dict(), "clip")
SIGLIP_224 = parse_pixel_spec(SiglipImageProcessorPil().to_dict(), "siglip")


def test_tiny_is_asked_for_by_name() -> None:
    checkpoint = find_checkpoint("tiny")
    assert (checkpoint.folder, checkpoint.model_type, checkpoint.revision) == (TINY, "clip", None)
    assert checkpoint.served_name == "tiny"


def test_a_folder_is_served_by_its_last_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_tiny(tmp_path / "my-model")
    assert find_checkpoint(str(tmp_path / "my-model")).served_name == "my-model"
    assert find_checkpoint(f"{tmp_path}/my-model/").served_name == "my-model"
    monkeypatch.chdir(tmp_path / "my-model")
    assert find_checkpoint(".").served_name == "my-model"


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_tiny(tmp_path / "openai" / "clip-vit-base-patch32")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("openai/clip-vit-base-patch32").revision is None


@pytest.mark.parametrize("kind", ["clip", "clip-int-sizes", "clip-nested", "siglip", "siglip2"])
def test_pixel_settings_are_read_from_every_kind_of_file(kind: str, checkpoints: dict[str, Path]) -> None:
    size = {"clip": 64, "clip-int-sizes": 96, "clip-nested": 80, "siglip": 48, "siglip2": 64}[kind]
    clip = replace(CLIP_224, shortest_edge=size, crop=(size, size))
    siglip = replace(SIGLIP_224, resize=(size, size))
    assert find_checkpoint(str(checkpoints[kind])).pixels == (clip if kind.startswith("clip") else siglip)


def test_the_reference_classes_own_settings_are_read() -> None:
    expected = PixelSpec(
        224, None, (224, 224), 3, 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    assert expected == CLIP_224
    assert PixelSpec(None, (224, 224), None, 3, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) == SIGLIP_224
    assert CLIP_224.size == SIGLIP_224.size == (224, 224)


@pytest.mark.parametrize(
    ("settings", "model_type", "expected"),
    [
        ({}, "clip", CLIP_224),
        ({}, "siglip", SIGLIP_224),
        ({"image_processor_type": "SiglipImageProcessor"}, "clip", SIGLIP_224),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}, "clip", CLIP_224),
        ({"image_processor_type": "CLIPImageProcessorFast"}, "clip", CLIP_224),
        ({"size": {"height": 90, "width": 80}, "do_center_crop": False}, "clip",
         replace(CLIP_224, shortest_edge=None, resize=(90, 80), crop=None)),
        ({"crop_size": {"height": 90, "width": 80}, "resample": 2}, "clip",
         replace(CLIP_224, crop=(90, 80), resample=2)),
    ],
)  # fmt: skip
def test_silence_means_the_reference_classes_defaults(settings: Any, model_type: str, expected: PixelSpec) -> None:
    assert parse_pixel_spec(settings, model_type) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported"),
        ({"do_resize": False}, "do_resize: false"),
        ({"do_normalize": False}, "do_normalize: false"),
        ({"do_rescale": False}, "do_rescale: false"),
        ({"do_convert_rgb": False}, "do_convert_rgb: false"),
        ({"do_center_crop": False}, "without a centre crop"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"size": None}, "image processor settings"),
        ({"image_mean": None}, "image processor settings"),
        ({"image_mean": "grey"}, "image processor settings"),
    ],
)
def test_pixel_settings_that_are_not_supported_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = copy_tiny(tmp_path / "odd")
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**content, **settings}))
    with pytest.raises(CheckpointUnsupported, match=message) as caught:
        find_checkpoint(str(folder))
    assert "odd" in str(caught.value) and caught.value.code == "checkpoint_unsupported"


@pytest.mark.parametrize("model_type", ["bert", "siglip2", "blip", "align", None])
def test_another_model_type_is_refused_by_its_name(tmp_path: Path, model_type: str | None) -> None:
    folder = copy_tiny(tmp_path / "other")
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(CheckpointUnsupported, match=f"model_type {model_type!r}; supported are clip, siglip") as caught:
        find_checkpoint(str(folder))
    assert caught.value.data["model_type"] == model_type


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointUnsupported, match=r"no model\.safetensors; other weight formats can run code"):
        find_checkpoint(str(folder))
    assert find_checkpoint(str(folder), weights=False).pixels == CLIP_224  # a decoder needs none


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text("{}")
    edit_json(folder / "model.safetensors.index.json", weight_map=index)
    with pytest.raises(CheckpointUnsupported, match=r"lacks its file model-00002-of-00002\.safetensors"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "\ud800"])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    folder = copy_tiny(tmp_path / "damaged")
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointUnsupported, match=r"damaged'.*config\.json"):
        find_checkpoint(str(folder))


def test_a_missing_processor_file_is_named(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointUnsupported, match=r"no preprocessor_config\.json"):
        find_checkpoint(str(folder))


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no checkpoint: it has no config\.json"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a/b/c", "a b", "\0", "x@", "../x"]
)
def test_what_can_be_no_hub_id_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(CheckpointNotFound, match=r"there is no such folder.*--model tiny"):
        find_checkpoint(name)


def test_a_folder_without_a_tokenizer_is_refused_where_texts_are_wanted(tmp_path: Path) -> None:
    """transformers would make an empty tokenizer, and every text the same vector."""
    folder = copy_tiny(tmp_path / "copy")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    Encoder(str(folder), "cpu", towers=("image",))
    with pytest.raises(CheckpointUnsupported, match="has no tokenizer"):
        Encoder(str(folder), "cpu")


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointUnsupported, match="its text tower 100"):
        Encoder(str(folder), "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": {"shortest_edge": -5}},
        {"size": {"shortest_edge": 10**9}},
        {"resample": 99},
        {"image_std": [0, 0, 0]},
        {"image_mean": [0.5]},
    ],
)
def test_pixel_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sizes must lie|resample 99|image_mean and image_std"):
        parse_pixel_spec({**CLIPImageProcessorPil().to_dict(), **wrong}, "clip")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": 3}])
def test_an_index_of_weights_that_names_none(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = copy_tiny(tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointUnsupported, match="has no weight_map"):
        find_checkpoint(str(folder))
