"""Compiles clipfleet/resample.c while a wheel is built or this tree is installed; without a compiler it is left out.

CC names the compiler (cc by default); CC="" leaves it out, which makes the wheel that runs on any platform.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# No fused multiply-add: it would change the last bit of coefficients.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
SOURCE, LIBRARY = "clipfleet/resample.c", "clipfleet/_resample.so"


class CompileResample(BuildHookInterface):
    """Adds the compiled library to a wheel, or puts it into the tree of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is `editable` or `standard`."""
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if self.target_name != "wheel" or not compiler or sys.platform != "linux":
            return
        tree = Path(self.root)
        # Beside its place, then renamed: a running process keeps the library that it has.
        home = tree / "clipfleet" if version == "editable" else None
        made = Path(tempfile.mkdtemp(dir=home), "_resample.so")
        try:
            subprocess.run(
                [*compiler, *FLAGS, "-o", str(made), str(tree / SOURCE), "-lm"],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(f"{SOURCE} is left out, and Pillow resizes images more slowly: {said}")
            made.parent.rmdir()
            return
        made.chmod(0o644)
        if version == "editable":
            made.replace(tree / LIBRARY)
            made.parent.rmdir()
            return
        build_data["force_include"][str(made)] = LIBRARY
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        self.temporary = made

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling after the wheel was written."""
        if made := getattr(self, "temporary", None):
            made.unlink()
            made.parent.rmdir()
