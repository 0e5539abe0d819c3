"""Who may import what, read from the source: imports go one way, and heavy libraries have one home each."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipfleet

ROOT = Path(__file__).parent.parent
LIBRARY = {
    ".".join(path.relative_to(ROOT / "clipfleet").with_suffix("").parts): path
    for path in (ROOT / "clipfleet").rglob("*.py")
}
COMMANDS = {name for name in LIBRARY if name.split(".")[0] in ("cli", "commands")}

# Where a library may be imported in clipfleet/, at all.
HOMES = {
    "torch": {"doctor", "openvino_engine", "torch_engine", "towers"},
    "openvino": {"openvino_engine"},
    "nncf": {"openvino_engine"},
    "transformers": {"encoder"},
    "safetensors": {"encoder", "towers"},
    "PIL": {"image_files", "images", "pixel_memory", "resample", "resize", "embedder", "samples", "wire"},
    "huggingface_hub": {"checkpoint", "catalogue"},
    "yaml": {"config_file"},
    "pydantic": {"config_file", "settings"},
    "httpx": {"connection", "wire"},
    "typer": COMMANDS,
}
COMMANDS_ONLY = {"ray", "deployments", "jobs"}  # inside functions of commands/ and doctor.py, and nowhere else


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the code names in an import, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import_time(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    found: list[ast.stmt] = []
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_each_library_has_its_home(name: str) -> None:
    for package in packages(parse(LIBRARY[name])):
        assert name in HOMES.get(package, {name}), f"{name} imports {package}, whose home is {HOMES[package]}"


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_the_library_knows_nothing_of_ray_and_what_runs_on_it(name: str) -> None:
    tree = parse(LIBRARY[name])
    if name in COMMANDS | {"doctor"}:  # inside the commands that start them
        tree = ast.Module(at_import_time(tree), type_ignores=[])
    assert not packages(tree) & COMMANDS_ONLY


def test_the_seed_path_only_passes_names_on() -> None:
    tree = parse(ROOT / "app" / "models" / "clip_model.py")
    assert packages(tree) == {"clipfleet"}
    assert "import" not in (ROOT / "app" / "__init__.py").read_text()


def test_the_in_process_interface_needs_the_seed_pages_packages_only() -> None:
    # "pip install torch transformers pillow numpy loguru tqdm", and what these bring along
    allowed = {"torch", "transformers", "PIL", "numpy", "loguru", "tqdm", "safetensors", "huggingface_hub"}
    # An extra, taken only where it is installed; and what the package's __init__ loads only for those who ask for it.
    seen: set[str] = {"clipfleet.openvino_engine", "clipfleet.client"}
    pending = ["clipfleet.embedder", "clipfleet.fingerprint", "clipfleet.__init__"]
    while pending:
        module = pending.pop()
        seen.add(module)
        tree = parse(LIBRARY[module.removeprefix("clipfleet.")])
        pending += [
            name for name in imported(tree)
            if name.startswith("clipfleet.") and name.removeprefix("clipfleet.") in LIBRARY and name not in seen
        ]  # fmt: skip
        foreign = packages(tree) - set(sys.stdlib_module_names) - {"clipfleet"}
        assert foreign <= allowed, f"{module} imports {foreign - allowed}"
    assert {"clipfleet.encoder", "clipfleet.images", "clipfleet.checkpoint", "clipfleet.errors"} <= seen


def loaded_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import clipfleet", "torch PIL ray transformers numpy pydantic yaml httpx typer loguru"),
        ("from clipfleet import rank, ClipfleetError", "torch PIL ray transformers pydantic"),
        ("from clipfleet import Client; Client", "torch PIL ray transformers pydantic yaml"),
        ("from clipfleet import load_image; load_image", "torch ray transformers pydantic"),
        ("import clipfleet.images, clipfleet.fingerprint", "torch ray transformers pydantic"),
        ("import clipfleet.settings", "torch PIL ray transformers yaml"),
        ("import clipfleet.config_file", "torch PIL ray transformers"),
        ("import clipfleet.cli", "torch PIL ray transformers numpy yaml httpx loguru"),
        ("import app.models.clip_model", "ray pydantic_settings typer fastapi deployments jobs"),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, absent: str) -> None:
    assert not loaded_after(statement) & set(absent.split())


def test_the_public_names_are_pinned() -> None:
    assert {"CLIPEmbedder", "CLIPModel", "Client", "ClipfleetError", "load_image", "rank"} <= set(clipfleet.__all__)
    assert set(clipfleet.__all__) <= {
        "AsyncClient", "CLIPEmbedder", "CLIPModel", "Client", "ClipfleetError", "load_image", "rank",
    }  # fmt: skip
    for name in clipfleet.__all__:
        assert getattr(clipfleet, name).__module__.startswith("clipfleet.")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clipfleet.nothing  # noqa: B018
