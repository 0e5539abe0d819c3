"""The `clipfleet` command: help, statuses, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

import clipfleet
from clipfleet.cli import app
from clipfleet.encoder import Encoder

COMMAND = Path(sys.executable).parent / "clipfleet"
NAMES = ["serve", "embed", "index", "duplicates", "encode", "models", "bench", "plan", "doctor"]
PAGE = Path(__file__).parent.parent / "docs" / "commands.md"


def run(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1", **variables}
    command = [str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def every(command: Any, path: str = "clipfleet") -> Iterator[tuple[str, Any]]:
    """Each command, with those under it."""
    yield path, command
    for name, under in getattr(command, "commands", {}).items():
        yield from every(under, f"{path} {name}")


@pytest.mark.parametrize("command", NAMES)
def test_help_has_an_example_that_starts_with_the_command(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0 and f"clipfleet {command}" in done.stdout.partition("Example")[2]


def test_each_command_argument_and_option_has_a_help_text() -> None:
    found = dict(every(get_command(app)))
    assert {"clipfleet", "clipfleet serve", "clipfleet keys", "clipfleet keys add"} <= found.keys()
    texts = {path: command.help for path, command in found.items()}
    texts |= {f"{path} {each.name}": each.help for path, command in found.items() for each in command.params}
    assert [name for name, text in texts.items() if not text] == []


def test_the_commands_stand_in_one_order_here_and_on_their_page() -> None:
    _, *paths = (path.split() for path, _ in every(get_command(app)))
    assert [name for _, name, *under in paths if not under] == [*NAMES, "keys"]
    assert re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.MULTILINE) == [*NAMES, "keys"]


def test_the_commands_and_the_version() -> None:
    listed = run("--help").stdout
    assert all(command in listed for command in NAMES)
    assert run("--version").stdout == f"clipfleet {clipfleet.__version__}\n"
    assert run("nothing").returncode == 2


def test_keys_are_added_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = run("keys", "add", "search-page", "--file", file).stdout.strip()
    assert key.startswith("cf_") and key not in file.read_text()
    assert run("keys", "list", CLIPFLEET_API_KEYS_FILE=str(file)).stdout == "search-page\n"
    assert run("keys", "list", "--json", "--file", file).stdout == '{"name": "search-page"}\n'
    assert run("keys", "revoke", "search-page", "--file", file).returncode == 0
    again = run("keys", "revoke", "search-page", "--file", file)
    assert again.returncode == 1 and again.stderr.startswith("clipfleet: there is no key 'search-page'")


class TestEncode:
    def test_json_lines_texts_first(self, picture_files: list[Path]) -> None:
        done = run("encode", "--model", "tiny", picture_files[0], "--text", "größer", "--text", "b")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0, done.stderr
        assert [row["input"] for row in rows] == ["größer", "b", str(picture_files[0])]
        assert [row["error"] for row in rows] == [None] * 3
        expected = Encoder("tiny", "cpu").encode_texts(["größer"]).vectors[0]
        assert np.abs(np.array(rows[0]["embedding"]) - expected).max() <= 1e-5

    def test_bad_files_are_rows_with_their_code_and_status_3(self, tmp_path: Path, picture_files: list[Path]) -> None:
        (tmp_path / "broken.jpg").write_bytes(picture_files[0].read_bytes()[:200])
        (tmp_path / "note.txt").write_text("a note")
        done = run("encode", "--model", "tiny", "broken.jpg", "note.txt", "gone.png", picture_files[0], cwd=tmp_path)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 3
        assert [row["error"] for row in rows] == ["image_corrupt", "image_format_unsupported", "file_not_found", None]
        assert [row["embedding"] is None for row in rows] == [True, True, True, False]

    def test_npy_has_nan_for_bad_rows(self, tmp_path: Path, picture_files: list[Path]) -> None:
        done = run("encode", "--model", "tiny", "gone.png", *picture_files[:2], "--out", "v.npy", cwd=tmp_path)
        vectors = np.load(tmp_path / "v.npy")
        assert done.returncode == 3 and done.stdout == "" and "gone.png: file_not_found" in done.stderr
        assert (vectors.shape, vectors.dtype) == ((3, 512), np.float32)
        assert np.isnan(vectors[0]).all() and np.abs(np.linalg.norm(vectors[1:], axis=1) - 1).max() < 1e-5

    def test_nothing_to_do_is_wrong_usage(self) -> None:
        done = run("encode", "--model", "tiny")
        assert done.returncode == 2 and "--text" in done.stderr

    def test_what_cannot_be_loaded_is_one_line(self, tmp_path: Path) -> None:
        done = run("encode", "--text", "a", HF_HOME=str(tmp_path))
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
        assert "openai/clip-vit-base-patch32" in done.stderr and "--model tiny" in done.stderr

    def test_an_out_file_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        done = run("encode", "--model", "tiny", "--text", "a", "--out", tmp_path / "none" / "v.npy")
        assert done.returncode == 1 and "Traceback" not in done.stderr and "v.npy" in done.stderr


class TestModels:
    def test_offline_lists_tiny_and_the_cache(self, tmp_path: Path) -> None:
        done = run("models", HF_HOME=str(tmp_path))
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 0 and [row["id"] for row in rows] == ["tiny"]

    def test_a_service_that_is_not_there(self) -> None:
        done = run("models", "--url", "http://127.0.0.1:9")
        assert done.returncode == 1 and "127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr

    def test_what_is_no_url(self) -> None:
        done = run("models", "--url", "nonsense")
        assert done.returncode == 1 and "nonsense" in done.stderr and "Traceback" not in done.stderr


def test_serve_and_embed_refuse_wrong_usage(tmp_path: Path) -> None:
    assert run("serve", "--port", "70000").returncode == 2
    assert run("embed", tmp_path).returncode == 2
    done = run("embed", tmp_path / "none", tmp_path / "out", "--model", "tiny")
    assert done.returncode == 2 and "none" in done.stderr
