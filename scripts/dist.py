"""`make dist`: what a release uploads, and each extra of it in a fresh environment.

Writes the source archive and two wheels into dist/: this platform's, with what it compiles, and any other's. Then installs the
first one with each extra into an environment of its own, the second one without any, and lets each do what it is for. Prints
how long installing took and how large the environment is. Arguments are extras to try alone: `make dist ARGS=serve,qdrant`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
TORCH = shlex.split(os.environ.get("TORCH_PIP_ARGS", ""))
ENCODED = (
    "from clipfleet import CLIPEmbedder; import numpy as np\n"
    "with CLIPEmbedder('tiny', engine='openvino') as embedder: vector = embedder.encode_text('a red circle')\n"
    "assert vector.shape == (512,) and abs(np.linalg.norm(vector) - 1) < 1e-5"
)
WITHOUT_TORCH = ("", "qdrant")
# What each extra is for, as commands in a folder that has `pictures`.
TRIES: dict[str, list[list[str]]] = {
    "": [
        ["clipfleet", "--version"],
        ["python", "-c", "from clipfleet import AsyncClient, Client; Client('http://127.0.0.1:8000').close()"],
    ],
    "local": [["clipfleet", "encode", "pictures/00000.png", "--model", "tiny", "--out", "vectors.npy"]],
    "openvino": [["python", "-c", ENCODED]],
    "serve": [
        ["clipfleet", "embed", "pictures", "vectors", "--model", "tiny"],
        ["python", "-c", "import deployments.graph"],
    ],
    "serve,qdrant": [["clipfleet", "index", "pictures", "--model", "tiny"]],
    "qdrant": [["python", "-c", "from clipfleet.qdrant import Collection"]],
    "tracing": [["python", "-c", "from deployments.tracing import exporters; exporters()[0].shutdown()"]],
}


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> None:
    """Run a command without anything of this Python's own; end with its words if it fails."""
    outer = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in outer} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd or ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}ended with status {done.returncode}")


def build() -> tuple[Path, Path]:
    """The wheel of this platform and the one of any platform, beside the source archive, all anew."""
    shutil.rmtree(DIST, ignore_errors=True)
    hatchling = (sys.executable, "-m", "hatchling", "build", "--directory", DIST)
    run(*hatchling, "--target", "sdist", "--target", "wheel", CC="")
    (for_any,) = DIST.glob("*.whl")
    run(*hatchling, "--target", "wheel")
    others = [wheel for wheel in DIST.glob("*.whl") if wheel != for_any]
    return (others or [for_any])[0], for_any


def check_metadata(wheel: Path) -> None:
    """Raise what packaging says of metadata that an index would refuse."""
    name, version, *_ = parse_wheel_filename(wheel.name)
    content = zipfile.ZipFile(wheel).read(f"clipfleet-{version}.dist-info/METADATA")
    found = Metadata.from_email(content)
    assert (found.name, found.version) == (name, version)


def try_extra(wheel: Path, extra: str, folder: Path) -> str:
    """Install and use it; what it cost, in words."""
    home = folder / "venv"
    venv.create(home, with_pip=True, symlinks=True)
    pip = (home / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    began = time.monotonic()
    if extra not in WITHOUT_TORCH:
        run(*pip, *TORCH, "torch")
    run(*pip, f"{wheel}[{extra}]" if extra else wheel)
    took = time.monotonic() - began
    run(sys.executable, ROOT / "scripts" / "draw_shapes.py", folder / "pictures", "--seed", "7", "--count", "4")
    for program, *arguments in TRIES[extra]:
        run(home / "bin" / program, *arguments, cwd=folder)
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file() and not file.is_symlink())
    return f"clipfleet{f'[{extra}]' if extra else ''}: installed in {took:.0f} s, {size / 1e6:,.0f} MB, works"


def main(extras: list[str]) -> None:
    if unknown := [extra for extra in extras if extra not in TRIES]:
        sys.exit(f"{unknown[0]!r} is none of {', '.join(filter(None, TRIES))}")
    compiled, for_any = build()
    for wheel in sorted(DIST.iterdir()):
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    for wheel in {compiled, for_any}:
        check_metadata(wheel)
    for extra in extras or TRIES:
        with tempfile.TemporaryDirectory() as folder:
            print(try_extra(compiled if extra else for_any, extra, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
