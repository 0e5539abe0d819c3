"""Engine openvino: as exact as torch in float32, measured in int8, converted once and kept."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfleet import openvino_engine
from clipfleet.encoder import Encoder
from clipfleet.engines import choose_engine, settle_device
from clipfleet.errors import CheckpointUnsupported, SettingsError
from clipfleet.images import decode
from scripts.draw_shapes import LABELS, draw
from tests.checkpoints import TINY, make_clip
from tests.reference import Reference

ROOT = Path(__file__).parent.parent
KINDS = ["tiny", "clip", "siglip", "siglip2"]
TEXTS = [
    "a red circle",
    "",
    "ünï 日本 и 😀",
    "one more word " * 200,
    "<|endoftext|> </s> <eos>",
    "a yellow star, by hand",
]


def kept(precision: str = "") -> dict[Path, float]:
    """The converted towers, with the time when each was written."""
    return {path: path.stat().st_mtime for path in openvino_engine.cache_folder().glob(f"*-{precision}*/model.xml")}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixels(encoder: Encoder, images: list[Image.Image]) -> np.ndarray:
    return np.stack([decode(image, encoder.checkpoint.pixels).pixels for image in images])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_the_reference(kind: str, checkpoints: dict[str, Path], pictures: list[Image.Image]) -> None:
    folder = TINY if kind == "tiny" else checkpoints[kind]
    encoder, reference = Encoder(str(folder), "cpu", engine="openvino"), Reference(folder)
    batch = pixels(encoder, pictures)
    images, texts = encoder.encode_pixels(batch), encoder.encode_texts(TEXTS)
    assert np.abs(images - reference.images(pictures)).max() <= 1e-5
    assert np.abs(texts.vectors - reference.texts(TEXTS)).max() <= 1e-5
    assert images.dtype == texts.vectors.dtype == np.float32
    one_by_one = np.concatenate([encoder.encode_pixels(item[None]) for item in batch])
    assert np.abs(one_by_one - images).max() <= 1e-5
    singly = np.concatenate([encoder.encode_texts([text]).vectors for text in TEXTS])
    assert np.abs(singly - texts.vectors).max() <= 1e-5
    batch.flags.writeable = False
    assert np.array_equal(encoder.encode_pixels(batch), images)


def test_int8_finds_what_float32_finds() -> None:
    exact, quick = Encoder("tiny", "cpu", engine="openvino"), Encoder("tiny", "cpu", "int8")
    rng = random.Random(77)
    batch = pixels(exact, [draw(rng).image for _ in range(200)])
    labels = [f"a {label}" for label in LABELS]
    images = exact.encode_pixels(batch), quick.encode_pixels(batch)
    texts = exact.encode_texts(labels).vectors, quick.encode_texts(labels).vectors
    for ours, theirs in (images, texts):
        cosines = (ours * theirs).sum(1)
        assert cosines.mean() >= 0.999 and cosines.min() > 0.98
        assert not np.array_equal(ours, theirs)
    nearest = [(image @ text.T).argmax(1) for image, text in zip(images, texts, strict=True)]
    assert (nearest[0] == nearest[1]).mean() >= 0.99
    for path in kept("int8"):
        report = json.loads((path.parent / "report.json").read_text())
        assert report["cosine to float32, mean"] >= 0.999 and report["lowest"] > 0.98


def test_int8_that_loses_too_much_is_refused(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(openvino_engine, "LOWEST_MEAN_COSINE", 1.1)
    with pytest.raises(
        CheckpointUnsupported, match=r"loses too much in int8.*1\.1 is asked for\. Use precision float32"
    ):
        Encoder(str(make_clip(tmp_path / "clip")), "cpu", "int8")
    assert not kept()


def test_a_converted_checkpoint_is_kept_by_its_content(empty_cache: Path, tmp_path: Path) -> None:
    first = make_clip(tmp_path / "first")
    Encoder(str(first), "cpu", towers=["image"], engine="openvino")
    before = kept()
    first.rename(tmp_path / "moved")
    Encoder(str(tmp_path / "moved"), "cpu", towers=["image"], engine="openvino")
    assert len(before) == 1 and kept() == before
    Encoder(str(make_clip(tmp_path / "other", seed=1)), "cpu", towers=["image"], engine="openvino")
    assert len(kept()) == 2 and kept().items() > before.items()


def test_processes_that_start_at_once_convert_once(empty_cache: Path, tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "clip")
    program = (
        "import sys\nfrom loguru import logger\nlogger.remove()\nlogger.add(sys.stdout, format='{message}')\n"
        "from clipfleet.encoder import Encoder\n"
        f"Encoder({str(folder)!r}, 'cpu', towers=['image'], engine='openvino')\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert "".join(said).count("converted the image tower") == 1
    assert not [path for path in openvino_engine.cache_folder().iterdir() if path.name.startswith(".making")]


def test_a_cache_that_cannot_be_written_is_said_and_gone_round(
    empty_cache: Path, log: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    empty_cache.write_text("a file where the folder should be")
    Encoder(str(make_clip(tmp_path / "clip")), "cpu", towers=["image"], engine="openvino")
    assert [message for level, message in log if level == "WARNING" and "cannot be written" in message]
    assert list(tmp_path.glob("clipfleet-engines-*/*/model.xml"))


def test_a_signal_after_the_engine_has_gone() -> None:
    """Such as Ctrl-C, in a program that embedded something before."""
    code = """
import os, signal
from clipfleet import CLIPEmbedder
for _ in range(2):
    with CLIPEmbedder("tiny", engine="openvino") as embedder:
        embedder.encode_text("a red circle")
    del embedder
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "went on\nwent on\n"), done.stderr


def test_nothing_is_reported_to_the_makers() -> None:
    program = "import clipfleet.openvino_engine, nncf, sys\nprint(sys.modules.get('openvino_telemetry'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines()[-1] == "None", done.stderr


@pytest.mark.parametrize(
    ("engine", "device", "precision", "chosen"),
    [
        ("auto", "cpu", "float32", "openvino"), ("auto", "cpu", "int8", "openvino"), ("auto", "cpu", "float16", "torch"),
        ("torch", "cpu", "float32", "torch"), ("auto", "cuda", "float32", "torch"), ("auto", "cuda:1", "float16", "torch"),
    ],
)  # fmt: skip
def test_the_engine_follows_device_and_precision(engine: str, device: str, precision: str, chosen: str) -> None:
    assert choose_engine(engine, device, precision) == chosen


@pytest.mark.parametrize(
    ("engine", "device", "precision", "problem"),
    [
        ("onnx", "cpu", "float32", "engine 'onnx' is unknown; known are auto, torch, openvino"),
        ("auto", "cpu", "int4", "precision 'int4' is unknown; known are float32, float16, bfloat16, int8"),
        ("openvino", "cuda", "float32", "engine openvino runs float32 and int8 on CPUs, not float32 on cuda"),
        ("auto", "cuda", "int8", "precision int8 runs on CPUs by engine openvino"),
        ("torch", "cpu", "int8", "precision int8 runs on CPUs by engine openvino"),
    ],
)
def test_what_does_not_go_together_is_refused(engine: str, device: str, precision: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        choose_engine(engine, device, precision)


def test_without_openvino_torch_runs_and_int8_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto", "cpu", "float32") == "torch"
    with pytest.raises(SettingsError, match=r"pip install 'clipfleet\[openvino\]'"):
        choose_engine("auto", "cpu", "int8")


@pytest.mark.parametrize(("engine", "precision"), [("auto", "int8"), ("openvino", "float32"), ("openvino", "int8")])
def test_what_only_cpus_run_means_cpu_where_nobody_names_a_device(engine: str, precision: str) -> None:
    assert settle_device("auto", engine, precision) == "cpu"
    assert settle_device("auto", "auto", "float32") == settle_device("auto", "torch", "float32") == "auto"
    assert settle_device("cuda:1", engine, precision) == "cuda:1", "which check_engine then refuses"
