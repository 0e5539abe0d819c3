"""Vectors of every supported kind of checkpoint, by engine torch, equal those of transformers itself."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipfleet.checkpoint import find_checkpoint
from clipfleet.encoder import Encoder
from clipfleet.engines import resolve_device
from clipfleet.errors import CheckpointUnsupported, DeviceUnavailable, InvalidRequest, SettingsError
from clipfleet.images import decode
from clipfleet.vectors import rank
from tests.checkpoints import TINY, copy_tiny, edit_json, make_clip, make_siglip
from tests.reference import Reference

ROOT = Path(__file__).parent.parent
KINDS = ["tiny", "clip", "clip-int-sizes", "clip-nested", "siglip", "siglip2"]
TEXTS = [
    "a red circle",
    "A RED Circle!",
    "",
    " ",
    "a yellow star on a purple background, drawn by hand",
    "ünï 日本 и 😀 e\u0301",
    "one more word " * 200,
    "<|endoftext|> </s> <eos>",
    "a\tb\nc\0d",
]


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {"tiny": TINY, **checkpoints}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {kind: Reference(folders[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, Encoder]:
    return {kind: Encoder(str(folders[kind]), "cpu", engine="torch") for kind in KINDS}


def pixels(encoder: Encoder, images: list[Image.Image]) -> np.ndarray:
    return np.stack([decode(image, encoder.checkpoint.pixels).pixels for image in images])


def spread(vectors: np.ndarray) -> float:
    """The smallest difference between two different rows."""
    differences = np.abs(vectors[:, None] - vectors[None]).max(2)
    return float(differences[~np.eye(len(vectors), dtype=bool)].min())


@pytest.mark.parametrize("kind", KINDS)
def test_images_equal_the_reference(
    kind: str, encoders: dict[str, Encoder], references: dict[str, Reference], pictures: list[Image.Image]
) -> None:
    vectors = encoders[kind].encode_pixels(pixels(encoders[kind], pictures))
    expected = references[kind].images(pictures)
    assert spread(expected) > 1e-3, "the pictures must differ for this to prove anything"
    assert vectors.dtype == np.float32 and vectors.shape == (12, encoders[kind].dimension)
    assert np.abs(vectors - expected).max() <= 1e-5
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_texts_equal_the_reference(kind: str, encoders: dict[str, Encoder], references: dict[str, Reference]) -> None:
    encoded = encoders[kind].encode_texts(TEXTS)
    assert encoded.vectors.dtype == np.float32 and encoded.vectors.shape == (len(TEXTS), encoders[kind].dimension)
    assert np.abs(encoded.vectors - references[kind].texts(TEXTS)).max() <= 1e-5
    assert encoded.truncated == [number == 6 for number in range(len(TEXTS))]
    assert spread(encoded.vectors[[0, 4, 5, 6]]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_items(kind: str, encoders: dict[str, Encoder], pictures: list[Image.Image]) -> None:
    encoder = encoders[kind]
    batch = pixels(encoder, pictures)
    one_by_one = np.concatenate([encoder.encode_pixels(item[None]) for item in batch])
    assert np.abs(encoder.encode_pixels(batch) - one_by_one).max() <= 1e-5
    texts = np.concatenate([encoder.encode_texts([text]).vectors for text in TEXTS])
    assert np.abs(encoder.encode_texts(TEXTS).vectors - texts).max() <= 1e-5


def edit_towers(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    towers = {name: {**config[name], **changes} for name in ("text_config", "vision_config")}
    edit_json(folder / "config.json", **towers)
    return folder


# What files on the hub say: openai's have quick_gelu and an end token of 2, LAION's gelu, SigLIP's gelu_pytorch_tanh.
@pytest.mark.parametrize(
    "changes",
    [{"eos_token_id": 2}, {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_new"},
     {"hidden_act": "relu"}, {"layer_norm_eps": 1e-2}, {"num_attention_heads": 4}, {"num_hidden_layers": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_settings_of_the_towers_count(
    kind: str, changes: dict[str, object], tmp_path: Path, encoders: dict[str, Encoder], pictures: list[Image.Image]
) -> None:
    folder = edit_towers((make_clip if kind == "clip" else make_siglip)(tmp_path / kind), **changes)
    encoder, reference = Encoder(str(folder), "cpu", engine="torch"), Reference(folder)
    images, texts = encoder.encode_pixels(pixels(encoder, pictures)), encoder.encode_texts(TEXTS).vectors
    assert np.abs(images - reference.images(pictures)).max() <= 1e-5
    assert np.abs(texts - reference.texts(TEXTS)).max() <= 1e-5


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    folder = edit_towers(make_clip(tmp_path / "clip"), hidden_act="mish")
    with pytest.raises(CheckpointUnsupported, match=r"activation 'mish' of its image tower.*supported are gelu"):
        Encoder(str(folder), "cpu", engine="torch")


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    folder = copy_tiny(tmp_path / "left")
    edit_json(folder / "tokenizer_config.json", padding_side="left")
    ours = Encoder(str(folder), "cpu", towers=["text"], engine="torch").encode_texts(TEXTS).vectors
    assert np.abs(ours - encoders["tiny"].encode_texts(TEXTS).vectors).max() <= 1e-6


@pytest.mark.parametrize(
    ("kind", "dimension", "image_size", "context"),
    [("tiny", 512, 224, 77), ("clip", 24, 64, 40), ("clip-int-sizes", 20, 96, 40), ("clip-nested", 36, 80, 40),
     ("siglip", 28, 48, 64), ("siglip2", 28, 64, 64)],
)  # fmt: skip
def test_sizes_are_the_checkpoints(
    kind: str, dimension: int, image_size: int, context: int, encoders: dict[str, Encoder]
) -> None:
    encoder = encoders[kind]
    assert (encoder.dimension, encoder.image_size, encoder.context_length) == (dimension, image_size, context)
    assert encoder.encode_pixels(np.zeros((0, image_size, image_size, 3), np.uint8)).shape == (0, dimension)
    assert encoder.encode_texts([]).vectors.shape == (0, dimension)


@pytest.mark.parametrize("kind", ["tiny", "siglip"])
def test_upper_case_does_not_matter(kind: str, encoders: dict[str, Encoder]) -> None:
    upper, lower = encoders[kind].encode_texts(["A RED CIRCLE", "a red circle"]).vectors
    assert np.abs(upper - lower).max() <= 1e-6


def test_tokens_are_counted_with_the_special_ones(encoders: dict[str, Encoder]) -> None:
    encoded = encoders["tiny"].encode_texts(["a red circle", "", "word " * 300])
    assert encoded.tokens == [5, 2, 77]  # start and end stand around the words


def test_a_text_that_just_fits_is_not_truncated(encoders: dict[str, Encoder]) -> None:
    encoded = encoders["clip"].encode_texts(["a " * 38, "a " * 39])
    assert encoded.tokens == [40, 40] and encoded.truncated == [False, True]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_ranking_follows_the_models_own_logits(
    kind: str, encoders: dict[str, Encoder], references: dict[str, Reference], pictures: list[Image.Image]
) -> None:
    encoder, reference = encoders[kind], references[kind]
    texts = ["a red circle", "a black ring", "a white cross", "a blue star"]
    padding = "max_length" if kind == "siglip" else True
    batch = reference.processor(text=texts, images=pictures[0], return_tensors="pt", padding=padding)
    with torch.inference_mode():
        logits = reference.model(**batch).logits_per_image[0]
    expected = logits.sigmoid() if kind == "siglip" else logits.softmax(0)
    image = encoder.encode_pixels(pixels(encoder, pictures[:1]))[0]
    ranked = rank(
        image, encoder.encode_texts(texts).vectors, logit_scale=encoder.logit_scale, logit_bias=encoder.logit_bias
    )
    assert (encoder.logit_bias is None) == (kind == "clip")
    for item in ranked:
        assert item.probability == pytest.approx(expected[item.index].item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_one_tower_alone_gives_the_same_vectors(
    kind: str, folders: dict[str, Path], encoders: dict[str, Encoder], pictures: list[Image.Image]
) -> None:
    image, text = (Encoder(str(folders[kind]), "cpu", towers=[tower], engine="torch") for tower in ("image", "text"))
    batch = pixels(image, pictures)
    assert np.array_equal(image.encode_pixels(batch), encoders[kind].encode_pixels(batch))
    assert np.array_equal(text.encode_texts(TEXTS).vectors, encoders[kind].encode_texts(TEXTS).vectors)
    assert list(image._models) == ["image"] and list(text._models) == ["text"], "the other tower costs no memory"
    assert (text.logit_scale, text.logit_bias) == (image.logit_scale, image.logit_bias)


@pytest.mark.parametrize(("precision", "cosine"), [("float16", 0.999), ("bfloat16", 0.999)])
def test_lower_precision_stays_close_and_float32_outside(
    precision: str, cosine: float, encoders: dict[str, Encoder], pictures: list[Image.Image]
) -> None:
    encoder = Encoder("tiny", "cpu", precision, engine="torch")
    batch = pixels(encoder, pictures)
    for ours, exact in (
        (encoder.encode_pixels(batch), encoders["tiny"].encode_pixels(batch)),
        (encoder.encode_texts(TEXTS).vectors, encoders["tiny"].encode_texts(TEXTS).vectors),
    ):
        assert ours.dtype == np.float32 and np.abs(np.linalg.norm(ours, axis=1) - 1).max() <= 1e-5
        assert (ours * exact).sum(1).min() > cosine
        assert not np.array_equal(ours, exact)


def test_pixels_of_another_size_or_type_are_refused(encoders: dict[str, Encoder]) -> None:
    for wrong in (np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 224, 224, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8 pixels"):
            encoders["tiny"].encode_pixels(wrong)


def test_read_only_pixels_are_taken(encoders: dict[str, Encoder], pictures: list[Image.Image]) -> None:
    batch = pixels(encoders["tiny"], pictures[:1])
    expected = encoders["tiny"].encode_pixels(batch)
    batch.flags.writeable = False
    assert np.array_equal(encoders["tiny"].encode_pixels(batch), expected)


def test_a_lone_surrogate_is_refused_with_its_index(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        encoders["tiny"].encode_texts(["fine", "bad \ud83d here"])
    assert caught.value.index == 1


def test_threads_may_share_an_encoder(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["tiny"]
    texts = [f"a {word}{number} text " * (1 + number % 30) for number in range(60) for word in ("red", "blue")]
    expected = encoder.encode_texts(texts).vectors
    with ThreadPoolExecutor(8) as pool:
        encoded = list(pool.map(lambda text: encoder.encode_texts([text]), texts))
    assert np.abs(np.concatenate([item.vectors for item in encoded]) - expected).max() <= 1e-5
    assert [item.truncated[0] for item in encoded] == encoder.encode_texts(texts).truncated


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="precision 'int4' is unknown; known are float32, float16, bfloat16"):
        Encoder("tiny", "cpu", "int4", engine="torch")
    with pytest.raises(SettingsError, match="device 'meta' is not supported"):
        Encoder("tiny", "meta")


def test_devices_resolve() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DeviceUnavailable) as caught:
        resolve_device("cuda:99")
    assert caught.value.data == {"device": "cuda:99"} and "'auto'" in str(caught.value)


def test_weights_that_are_missing_are_refused_by_name(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "cut")
    _rewrite_weights(folder, lambda weights: {k: v for k, v in weights.items() if k != "visual_projection.weight"})
    with pytest.raises(CheckpointUnsupported, match=r"image tower.*visual_projection\.weight"):
        Encoder(str(folder), "cpu", engine="torch")
    Encoder(str(folder), "cpu", towers=["text"], engine="torch")  # its own tower is whole


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "bent")
    _rewrite_weights(folder, lambda weights: {**weights, "text_projection.weight": torch.zeros(256, 128)})
    with pytest.raises(CheckpointUnsupported, match=r"text tower.*text_projection\.weight"):
        Encoder(str(folder), "cpu", engine="torch")


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path / "damaged")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointUnsupported, match=r"'.*damaged' cannot be loaded"):
        Encoder(str(folder), "cpu", engine="torch")


def test_a_processor_that_does_not_fit_the_tower_is_refused(tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "clip")
    edit_json(folder / "preprocessor_config.json", crop_size={"height": 32, "width": 32})
    with pytest.raises(CheckpointUnsupported, match="makes 32 x 32 pixels, its vision tower takes 64 x 64"):
        Encoder(str(folder), "cpu", engine="torch")


def test_sharded_weights_load(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    from transformers import CLIPModel

    folder = copy_tiny(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    CLIPModel.from_pretrained(TINY).save_pretrained(folder, max_shard_size="1MB")
    assert len(find_checkpoint(str(folder)).weight_files()) > 2
    sharded = Encoder(str(folder), "cpu", engine="torch")
    assert np.array_equal(sharded.encode_texts(TEXTS).vectors, encoders["tiny"].encode_texts(TEXTS).vectors)
    assert sharded.logit_scale == encoders["tiny"].logit_scale


def test_weights_in_bfloat16_load(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    from transformers import CLIPModel

    folder = copy_tiny(tmp_path / "bfloat16")
    CLIPModel.from_pretrained(TINY).bfloat16().save_pretrained(folder)
    encoder = Encoder(str(folder), "cpu", engine="torch")
    cosines = (encoder.encode_texts(TEXTS).vectors * encoders["tiny"].encode_texts(TEXTS).vectors).sum(1)
    assert cosines.min() > 0.999
    assert encoder.logit_scale == pytest.approx(encoders["tiny"].logit_scale, rel=0.02)


def test_other_seeds_give_other_vectors(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    other = Encoder(str(make_siglip(tmp_path / "siglip", seed=1)), "cpu")
    ours, theirs = (each.encode_texts(["a red circle"]).vectors for each in (encoders["siglip"], other))
    assert np.abs(ours - theirs).max() > 1e-2


def _rewrite_weights(folder: Path, change: object) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})  # type: ignore[operator]


def test_long_texts_leave_no_output_and_no_changed_setting() -> None:
    program = (
        "import transformers\n"
        "from clipfleet.encoder import Encoder\n"
        "before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()\n"
        "encoder = Encoder('tiny', 'cpu', engine='torch')\n"
        "print(encoder.encode_texts(['word ' * 500]).truncated)\n"
        "print(before == (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.stdout, done.stderr) == ("[True]\nTrue\n", "")


def test_a_long_list_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder("tiny", "cpu", towers=("text",))
    texts = [f"a {'very ' * (number % 5)}red circle {number}" for number in range(23)] + ["long " * 200]
    whole = encoder.encode_texts(texts)
    monkeypatch.setattr("clipfleet.encoder._TEXTS_AT_ONCE", 5)
    pieces = encoder.encode_texts(texts)
    assert np.abs(whole.vectors - pieces.vectors).max() <= 1e-5
    assert whole[1:] == pieces[1:] and whole.truncated == [False] * 23 + [True]
    with pytest.raises(InvalidRequest) as refused:
        encoder.encode_texts([*texts, "half a \ud800"])
    assert refused.value.index == 24
