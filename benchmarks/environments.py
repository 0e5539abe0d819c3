"""A virtual environment for each peer, so that each has the versions that it asks for."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.data import CACHE

# torch is the same everywhere, so that ratios compare programs and not builds of torch.
TORCH = "torch==2.13.0"
PLAIN = [TORCH, "transformers==5.23.0", "pillow==13.0.0", "numpy==2.4.6"]
INFINITY = [TORCH, "infinity-emb[server,torch,vision,optimum]==0.0.78", "aiohttp", "soundfile"]
INFINITY_WITHOUT = ["torchvision", "timm"]  # which does not import beside torch's CPU build
LITSERVE = [*PLAIN, "litserve==0.2.17"]


def environment(name: str, packages: list[str], without: list[str] | None = None) -> Path:
    """The folder of executables of a virtual environment with `packages`; made at its first use."""
    wanted = hashlib.sha256(repr((packages, without, sys.version_info[:2])).encode()).hexdigest()[:8]
    folder = CACHE / "environments" / f"{name}-{wanted}"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", *packages], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--yes", *without], check=True)
        (folder / "made").touch()
    return folder / "bin"
