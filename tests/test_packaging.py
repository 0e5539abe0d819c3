"""What a person gets who installs the wheel: its files, its light install, and the versions that are pinned for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import clipfleet

ROOT = Path(__file__).parents[1]
PACKAGES = ("clipfleet", "deployments", "jobs")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a person would outside the checkout: nothing of this session's Python leaks in."""
    outer = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def pip(*arguments: str | Path, cwd: Path) -> None:
    done = run(sys.executable, "-m", "pip", *arguments, "--quiet", "--no-input", cwd=cwd)
    assert done.returncode == 0, done.stderr


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in named}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("CC", raising=False)
        return make_wheel(tmp_path_factory.mktemp("wheel"))


def make_wheel(folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the wheel without extras."""
    home = tmp_path_factory.mktemp("light") / "venv"
    venv.create(home, symlinks=True)
    installer = ("--python", home / "bin" / "python", "install", "--constraint", ROOT / "constraints.txt")
    pip(*installer, wheel, cwd=home)
    return home / "bin"


class TestWheel:
    def test_holds_the_packages_and_nothing_beside_them(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        assert wheel.name.startswith(f"clipfleet-{clipfleet.__version__}-py3-none-")
        assert {name.split("/")[0] for name in names} == {*PACKAGES, f"clipfleet-{clipfleet.__version__}.dist-info"}
        assert not [name for name in names if "__pycache__" in name]

    @pytest.mark.skipif(
        shutil.which("cc") is None or sysconfig.get_platform() != "linux-x86_64", reason="not compiled on this machine"
    )
    def test_holds_what_the_compiler_made_for_this_platform(self, wheel: Path) -> None:
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        assert wheel.name.endswith(f"-py3-none-{platform}.whl")
        assert "clipfleet/_resample.so" in zipfile.ZipFile(wheel).namelist()

    @pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
    def test_without_a_compiler_it_is_for_any_platform(
        self, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", compiler)
        built = make_wheel(tmp_path)
        assert built.name.endswith("-py3-none-any.whl")
        assert "clipfleet/_resample.so" not in zipfile.ZipFile(built).namelist()

    def test_holds_every_module_and_the_embedded_checkpoint(self, wheel: Path) -> None:
        held = set(zipfile.ZipFile(wheel).namelist())
        assert {str(path.relative_to(ROOT)) for path in self._sources()} <= held

    def test_holds_the_yaml_files_inside_deployments(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        expected = {f"deployments/configs/{path.name}": path for path in (ROOT / "configs").iterdir()}
        expected["deployments/serve_config.yaml"] = ROOT / "serve_config.yaml"
        assert {name for name in archive.namelist() if name.endswith(".yaml")} == set(expected)
        assert {name: archive.read(name) for name in expected} == {
            name: path.read_bytes() for name, path in expected.items()
        }

    def test_programs_stay_executable(self, wheel: Path) -> None:
        entries = zipfile.ZipFile(wheel).infolist()
        inside = {entry.filename for entry in entries if (entry.external_attr >> 16) & 0o100}
        assert inside == {str(path.relative_to(ROOT)) for path in self._sources() if os.access(path, os.X_OK)}

    def test_carries_licence_and_command(self, wheel: Path) -> None:
        archive = zipfile.ZipFile(wheel)
        info = f"clipfleet-{clipfleet.__version__}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"clipfleet = clipfleet.cli:run" in archive.read(f"{info}/entry_points.txt")

    def _sources(self) -> Iterator[Path]:
        for package in PACKAGES:
            yield from (ROOT / package).rglob("*.py")
        yield from (ROOT / "clipfleet" / "checkpoints").rglob("*.*")
        yield ROOT / "clipfleet" / "py.typed"


class TestLightInstall:
    def test_imports_without_torch_pillow_and_ray(self, light: Path) -> None:
        code = (
            "import importlib.util, clipfleet; print(clipfleet.__version__, clipfleet.Client.__module__);"
            "print([name for name in ('torch', 'transformers', 'PIL', 'ray') if importlib.util.find_spec(name)])"
        )
        done = run(light / "python", "-W", "error", "-c", code, cwd=light)
        assert done.stdout.split("\n")[:2] == [f"{clipfleet.__version__} clipfleet.client", "[]"], done.stderr

    def test_help_lists_the_commands(self, light: Path) -> None:
        done = run(light / "clipfleet", "--help", cwd=light)
        assert done.returncode == 0, done.stderr
        assert [command for command in ("serve", "embed", "encode", "models") if command not in done.stdout] == []

    @pytest.mark.parametrize(
        ("extra", "arguments"),
        [
            ("serve", ["serve", "demo"]),
            ("serve", ["embed", "pictures", "vectors"]),
            ("local", ["encode", "--text", "a red circle", "--model", "tiny"]),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else value,
    )
    def test_a_command_names_the_extra_it_lacks(self, light: Path, extra: str, arguments: list[str]) -> None:
        done = run(light / "clipfleet", *arguments, cwd=light)
        # A terminal's width may break the line anywhere.
        shown = re.sub(r"\s+", "", done.stdout + done.stderr)
        assert done.returncode != 0
        assert f"clipfleet[{extra}]" in shown
        assert "Traceback" not in shown

    def test_nothing_of_it_needs_posix(self, light: Path) -> None:
        """What Python has on no Windows; the client is used there too."""
        code = (
            "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'grp', 'pwd', 'resource', 'termios')));"
            "import clipfleet.cli; from clipfleet import AsyncClient, Client; Client('http://127.0.0.1:9').close(); "
            "sys.argv = ['clipfleet', '--version']; clipfleet.cli.run()"
        )
        done = run(light / "python", "-c", code, cwd=light)
        assert done.stdout == f"clipfleet {clipfleet.__version__}\n", done.stderr


def test_the_changelog_begins_with_this_version() -> None:
    heading = re.search(r"^## \[(\S+)\] – (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None and heading[1] == clipfleet.__version__


class TestPinnedSet:
    def test_every_package_of_every_extra_is_pinned_and_installed_so(self) -> None:
        pinned = pins()
        wrong = {
            f"{name} {installed}": str(pinned.get(name))
            for name, installed in self._brought()
            if pinned.get(name) != installed
        }
        assert not wrong, "installed, and what constraints.txt says"

    def test_pins_satisfy_the_declared_ranges(self) -> None:
        pinned = pins()
        assert [
            str(need) for need in self._declared() if pinned[canonicalize_name(need.name)] not in need.specifier
        ] == []

    def _declared(self) -> list[Requirement]:
        metadata = project()
        lists = [metadata["dependencies"], *metadata["optional-dependencies"].values()]
        needs = [Requirement(text) for texts in lists for text in texts]
        return [need for need in needs if need.name != "clipfleet"]

    def _brought(self) -> Iterator[tuple[str, Version]]:
        """Every distribution that the declared ones bring here, except those that their parent pins exactly."""
        waiting, seen = self._declared(), set()
        while waiting:
            need = waiting.pop()
            name, key = canonicalize_name(need.name), str(need)
            if key in seen:
                continue
            seen.add(key)
            found = self._installed(name)
            if found is None:
                continue
            yield name, Version(found.version.split("+")[0])
            for line in found.requires or []:
                child = Requirement(line)
                exact = any(part.operator == "==" for part in child.specifier)
                extras = [*need.extras, ""]
                applies = child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras)
                if applies and not exact:
                    waiting.append(child)

    def _installed(self, name: str) -> Any:
        try:
            return distribution(name)
        except PackageNotFoundError:  # another platform's
            return None
