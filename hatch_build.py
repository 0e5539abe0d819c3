"""Compiles clipfleet/resample.c while a wheel is built or this tree is installed, on x86-64 Linux with a C compiler.

CC names the compiler (cc by default). CC="" leaves the library out, which makes the wheel that runs on any platform.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
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

    _folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds; `version` is `editable` or `standard`."""
        if self.target_name != "wheel":
            return
        in_tree = Path(self.root, LIBRARY)
        if version == "editable":
            in_tree.unlink(missing_ok=True)  # of another source, perhaps
        made = self._compile()
        if made is None:
            return
        if version == "editable":
            # Renamed into its place: a process that has loaded another one keeps it.
            shutil.copyfile(made, in_tree.with_suffix(".new"))
            in_tree.with_suffix(".new").replace(in_tree)
            return
        build_data["force_include"][str(made)] = LIBRARY
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling after the wheel was written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compile(self) -> Path | None:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if not compiler or sys.platform != "linux" or platform.machine() != "x86_64":
            return None
        self._folder = tempfile.mkdtemp()
        made = Path(self._folder, "_resample.so")
        command = [*compiler, *FLAGS, "-o", str(made), str(Path(self.root, SOURCE)), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
            self.app.display_warning(f"{SOURCE} is left out, so Pillow resizes the images, more slowly: {said}")
            return None
        made.chmod(0o644)
        return made
