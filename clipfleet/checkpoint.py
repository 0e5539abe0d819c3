"""A checkpoint's name, its folder, and how it wants its pixels. Nothing here needs torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipfleet.errors import CheckpointNotFound, CheckpointUnsupported

EMBEDDED = {"tiny": Path(__file__).parent / "checkpoints" / "tiny"}
MODEL_TYPES = ("clip", "siglip")

# "openai/clip-vit-base-patch32", optionally "@revision" (a branch, a tag or a commit)
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_CONFIG_FILES = ["*.json", "*.txt", "*.model"]
_WEIGHT_FILES = ["model*.safetensors"]
_LARGEST_EDGE = 4096
_CONVERTER = ("SFconvertbot", "Adding `safetensors` variant of this model")  # who, and under which title
_OFFLINE_HINT = "`tiny` (the embedded checkpoint) works offline: --model tiny"


@dataclass(frozen=True)
class PixelSpec:
    """How a checkpoint wants its pictures: the settings of its image processor that change pixels.

    Sizes are (height, width) in pixels. `shortest_edge` is None where both edges are given by `resize`.
    `mean` and `std` apply to pixels scaled to 0..1.
    """

    shortest_edge: int | None
    resize: tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every decoded picture."""
        size = self.crop or self.resize
        assert size is not None  # parse_pixel_spec refuses anything else
        return size


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `revision` is the hub's commit, None for a folder."""

    name: str
    folder: Path
    revision: str | None
    model_type: Literal["clip", "siglip"]
    pixels: PixelSpec

    @property
    def served_name(self) -> str:
        """The name as answers show it: a folder's last path component, otherwise the name that was given."""
        return self.name if self.revision or self.name in EMBEDDED else self.folder.resolve().name

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights. Raises CheckpointUnsupported if one is missing."""
        single = self.folder / "model.safetensors"
        index = self.folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            listed = _read_json(index, self.name).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()) or not listed:
                raise CheckpointUnsupported(f"checkpoint {self.name!r}: {index.name} has no weight_map", name=self.name)
            files = [self.folder / file for file in sorted(set(listed.values()))]
            for file in files:
                if not file.is_file():
                    raise CheckpointUnsupported(f"checkpoint {self.name!r} lacks its file {file.name}", name=self.name)
            return files
        raise CheckpointUnsupported(
            f"checkpoint {self.name!r} has no model.safetensors; other weight formats can run code and are not loaded. "
            f"Where the hub has a converted copy at another revision, name it: --model ID@REVISION",
            name=self.name,
        )


def find_checkpoint(name: str, *, weights: bool = True, download: bool = True) -> Checkpoint:
    """Find a checkpoint by `tiny`, a local folder, or a hub id with an optional `@revision`.

    With `weights=False` a hub download leaves the weights out (decoders need none); with `download=False` there is none.
    Raises CheckpointNotFound or CheckpointUnsupported.
    """
    folder, revision = _locate(name, weights, download)
    model_type = _read_json(folder / "config.json", name).get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointUnsupported(
            f"checkpoint {name!r} has model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}",
            name=name,
            model_type=model_type,
        )
    checkpoint = Checkpoint(name, folder, revision, model_type, _read_pixel_spec(folder, name, model_type))
    if weights:
        checkpoint.weight_files()  # raises if one is missing
    return checkpoint


def _locate(name: str, weights: bool, download: bool) -> tuple[Path, str | None]:
    if name in EMBEDDED:
        return EMBEDDED[name], None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointNotFound(f"folder {name!r} holds no checkpoint: it has no config.json", name=name)
        return folder, None
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None or name.startswith((".", "/", "~")):
        raise CheckpointNotFound(f"no checkpoint at {name!r}: there is no such folder. {_OFFLINE_HINT}", name=name)
    return _from_hub(hub_id["id"], hub_id["revision"], weights, download)


def _from_hub(hub_id: str, revision: str | None, weights: bool, download: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = _CONFIG_FILES + (_WEIGHT_FILES if weights else [])
    try:
        local = not download
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=local))
        if weights and revision is None and not any(folder.glob("model*.safetensors")):
            # Refs of the hub's cache are names of commits; this one makes the next start work offline.
            ref = folder.parents[1] / "refs" / "clipfleet" / f"safetensors-of-{folder.name}"
            known = ref.read_text() if ref.is_file() else None
            converted = known or (_converted_revision(hub_id, folder.name) if download else None)
            if converted:
                folder = Path(
                    snapshot_download(hub_id, revision=converted, allow_patterns=patterns, local_files_only=local)
                )
                if known is None:
                    ref.parent.mkdir(parents=True, exist_ok=True)
                    ref.write_text(converted)
    except Exception as error:  # the hub's client lets through errors of every layer below it
        name = f"{hub_id}@{revision}" if revision else hub_id
        raise CheckpointNotFound(
            f"checkpoint {name!r} is not in the local hub cache and could not be downloaded: "
            f"{_first_line(error)}. {_OFFLINE_HINT}"
            if download
            else f"checkpoint {name!r} is not in the local hub cache; the first use downloads it",
            name=name,
        ) from error
    return folder, folder.name


def _converted_revision(hub_id: str, main: str) -> str | None:
    """Find the hub's own safetensors conversion of the commit `main`.

    Old checkpoints (openai/clip-vit-base-patch32 among them) hold pickled weights on their main branch,
    and the converted file in an open pull request of the hub's bot, on top of that same commit.
    """
    from huggingface_hub import HfApi

    author, title = _CONVERTER
    api = HfApi()
    for request in api.get_repo_discussions(hub_id, author=author, discussion_type="pull_request"):
        genuine = request.author == author and request.title == title and request.status == "open"
        if genuine and request.git_reference:
            commits = [commit.commit_id for commit in api.list_repo_commits(hub_id, revision=request.git_reference)]
            if commits[1:2] == [main]:
                return commits[0]
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointUnsupported(f"checkpoint {name!r} has no {path.name}", name=name) from error
    except (OSError, ValueError) as error:
        raise CheckpointUnsupported(f"checkpoint {name!r}: {path.name} cannot be read: {error}", name=name) from error
    if not isinstance(content, dict):
        raise CheckpointUnsupported(f"checkpoint {name!r}: {path.name} holds no JSON object", name=name)
    return content


def _read_pixel_spec(folder: Path, name: str, model_type: str) -> PixelSpec:
    # transformers 5 nests the image processor in processor_config.json and prefers that to the older file.
    settings: dict[str, Any] | None = None
    if (folder / "processor_config.json").is_file():
        settings = _read_json(folder / "processor_config.json", name).get("image_processor")
        if settings is not None and not isinstance(settings, dict):
            raise CheckpointUnsupported(
                f"checkpoint {name!r}: processor_config.json: image_processor is no object", name=name
            )
    if settings is None:
        settings = _read_json(folder / "preprocessor_config.json", name)
    try:
        return parse_pixel_spec(settings, model_type)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointUnsupported(f"checkpoint {name!r}: image processor settings: {error}", name=name) from error


# What the reference's processor classes fill in where a file is silent
# (transformers 5: CLIPImageProcessorPil, SiglipImageProcessorPil).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip": {
        "size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": False,
        "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
    },
}  # fmt: skip
_PROCESSORS = {
    "CLIPImageProcessor": "clip",
    "CLIPImageProcessorFast": "clip",
    "CLIPImageProcessorPil": "clip",
    "CLIPFeatureExtractor": "clip",
    "SiglipImageProcessor": "siglip",
    "SiglipImageProcessorFast": "siglip",
    "SiglipImageProcessorPil": "siglip",
}


def parse_pixel_spec(settings: dict[str, Any], model_type: str) -> PixelSpec:
    """Read an image processor's settings as its reference class does. Raises ValueError for what is not supported."""
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if kind is not None and kind not in _PROCESSORS:
        raise ValueError(f"image processor {kind!r} is not supported; supported are {', '.join(_PROCESSORS)}")
    merged = {**_DEFAULTS[_PROCESSORS[kind] if kind else model_type], **settings}
    for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if merged.get(flag) is False:
            raise ValueError(f"{flag}: false is not supported")

    shortest_edge, resize = _parse_size(merged["size"], _PROCESSORS[kind] if kind else model_type)
    crop = _parse_crop(merged["crop_size"]) if merged["do_center_crop"] else None
    if crop is None and resize is None:
        raise ValueError("without a centre crop, size must give height and width")
    spec = PixelSpec(
        shortest_edge=shortest_edge,
        resize=resize,
        crop=crop,
        resample=int(merged.get("resample", 3)),
        rescale=float(merged.get("rescale_factor", 1 / 255)),
        mean=tuple(float(value) for value in merged["image_mean"]),
        std=tuple(float(value) for value in merged["image_std"]),
    )
    edges = [edge for edge in (shortest_edge, *(resize or ()), *(crop or ())) if edge is not None]
    if not all(1 <= edge <= _LARGEST_EDGE for edge in edges):
        raise ValueError(f"sizes must lie between 1 and {_LARGEST_EDGE} pixels, not {edges}")
    if not 0 <= spec.resample <= 5:
        raise ValueError(f"resample {spec.resample} is no filter; there are 0 to 5")
    if len(spec.mean) != 3 or len(spec.std) != 3 or min(spec.std) <= 0 or spec.rescale <= 0:
        raise ValueError("image_mean and image_std must hold three numbers, std and rescale_factor above 0")
    return spec


def _parse_size(size: Any, processor: str) -> tuple[int | None, tuple[int, int] | None]:
    if isinstance(size, int):  # old files: both reference classes read it as the shortest edge
        return size, None
    if isinstance(size, (list, tuple)):
        return None, (int(size[0]), int(size[1]))
    if set(size) == {"height", "width"}:
        return None, (int(size["height"]), int(size["width"]))
    if "shortest_edge" in size and set(size) <= {
        "shortest_edge",
        "longest_edge",
    }:  # the reference passes over the latter
        return int(size["shortest_edge"]), None
    raise ValueError(f"size {size!r} is not supported for a {processor} processor")


def _parse_crop(crop: Any) -> tuple[int, int]:
    if isinstance(crop, int):
        return crop, crop
    return int(crop["height"]), int(crop["width"])
