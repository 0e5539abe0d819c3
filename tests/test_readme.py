"""The README's code runs as written, against the wheel that is built from this tree."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MAKE_ONLY = ["make demo\n", "make test\n"]  # these two would run this test again


def test_every_block_is_a_language_that_is_run_here() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert [code for language, code in BLOCKS if language == "bash" and re.match(r"make\b", code)] == MAKE_ONLY


def test_links_point_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree's files, so that the examples write nothing into the tree."""
    folder = tmp_path_factory.mktemp("readme") / "clipfleet"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment that sees the installed dependencies, but gets clipfleet from the README's own lines."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    outer = next(path for path in site.getsitepackages() if path.endswith("site-packages"))
    (packages / "outer.pth").write_text(outer + "\n")  # added last, and without the .pth files in it
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": str(folder), "PIP_NO_BUILD_ISOLATION": "1"}


def test_the_examples_run_in_order(checkout: Path, environment: dict[str, str]) -> None:
    for language, code in BLOCKS:
        if code in MAKE_ONLY:
            continue
        program = ["bash", "-ec", f"set -m; {code}"] if language == "bash" else ["python", "-c", code]
        done = subprocess.run(
            program, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, start_new_session=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if "rank(" in code:
            nearest = (checkout / done.stdout.split()[0]).name
            assert nearest in _pictures_of(checkout, "purple star"), done.stdout
        if "curl" in code:
            assert '"object":"list"' in done.stdout
            assert (checkout / "vectors.npy").read_bytes().startswith(b"\x93NUMPY")
        if "read_table" in code:
            assert done.stdout.startswith(
                "24 ['id', 'uri', 'embedding', 'width', 'height', 'error', 'size', 'modified']"
            )
    found = subprocess.run(
        ["python", "-c", "import clipfleet; print(clipfleet.__file__)"],
        cwd=checkout.parent, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith(environment["VIRTUAL_ENV"])


def _pictures_of(checkout: Path, label: str) -> set[str]:
    lines = (checkout / "pictures" / "labels.csv").read_text().splitlines()[1:]
    return {line.split(",")[0] for line in lines if line.split(",")[1] == label}
