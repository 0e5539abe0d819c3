"""API keys in a file: shown once, kept as hashes, replaced whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfleet.errors import SettingsError
from clipfleet.keys import KeyRing, add_key, digest, hashed, read_keys, revoke_key
from clipfleet.settings import service_settings


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, second = add_key(file, "search-page"), add_key(file, "importer")
    assert first != second and len(first) > 40
    assert first not in file.read_text() and second not in file.read_text()
    assert read_keys(file) == {"search-page": digest(first), "importer": digest(second)}
    assert file.stat().st_mode & 0o077 == 0  # its owner's alone
    ring = KeyRing((), str(file))
    assert (ring.name_of(first), ring.name_of(second), ring.name_of("")) == ("search-page", "importer", None)


def test_settings_keep_hashes_of_fixed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFLEET_API_KEYS", "from-the-shell")
    settings = service_settings({"model": "tiny", "api_keys": ["from-the-config"]})
    assert settings.api_keys == (hashed("from-the-config"), hashed("from-the-shell"))
    assert not any("from-the" in key for key in settings.api_keys)
    again = service_settings({"model": "tiny", "api_keys": list(settings.api_keys)})
    ring = KeyRing(again.api_keys, None)
    assert ring.name_of("from-the-config") == "key 1" and ring.name_of("from-the-shell") is not None
    assert ring.name_of(settings.api_keys[0]) is None, "what is kept lets nobody in"


def test_a_revoked_key_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "one")
    add_key(file, "two")
    revoke_key(file, "one")
    assert list(read_keys(file)) == ["two"]
    assert KeyRing((), str(file)).name_of(key) is None
    with pytest.raises(SettingsError, match="there is no key 'one'; there are two"):
        revoke_key(file, "one")


def test_the_file_keeps_its_mode_its_link_and_its_comments(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    add_key(real, "one")
    real.chmod(0o640)
    real.write_text(f"# of the shop\n\n{real.read_text()}")
    link.symlink_to(real)
    add_key(link, "two")
    revoke_key(link, "one")
    assert link.is_symlink() and list(read_keys(real)) == ["two"]
    assert real.stat().st_mode & 0o777 == 0o640
    assert real.read_text().startswith("# of the shop\n\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_keeps_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "one")
    os.chown(file, 1234, 1234)
    add_key(file, "two")
    revoke_key(file, "one")
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 1234)


def test_commands_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    code = (
        "import sys; from clipfleet.keys import add_key, revoke_key; "
        "f, n = sys.argv[1:]; add_key(f, n); add_key(f, n + '-b'); revoke_key(f, n)"
    )
    adding = [subprocess.Popen([sys.executable, "-c", code, str(file), f"name{number}"]) for number in range(6)]
    assert [process.wait(60) for process in adding] == [0] * 6
    assert sorted(read_keys(file)) == [f"name{number}-b" for number in range(6)]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be written"):
        add_key(tmp_path / "nowhere" / "keys", "one")


def test_names_are_taken_once_and_plain(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "one")
    with pytest.raises(SettingsError, match="there is a key 'one' already"):
        add_key(file, "one")
    for name in ("", "two words", "-x", "a" * 65, "new\nline"):
        with pytest.raises(SettingsError, match="is no name of a key"):
            add_key(file, name)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("one\n", "line 1: a line is NAME"),
        ("\none two\n", "line 2: a line is NAME"),
        (f"one {'a' * 64}\none {'b' * 64}\n", "line 2: the name 'one' is there twice"),
    ],
)
def test_a_damaged_file_is_refused_by_its_line(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match=problem):
        read_keys(file)


def test_a_service_does_not_start_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="the file of API keys cannot be read"):
        service_settings({"api_keys_file": str(tmp_path / "absent")})
    (tmp_path / "keys").write_text("")
    monkeypatch.setenv("CLIPFLEET_API_KEYS_FILE", str(tmp_path / "keys"))
    settings = service_settings({})
    assert settings.api_keys_file == str(tmp_path / "keys")
    assert KeyRing((), settings.api_keys_file).asks  # a file without keys lets nobody in
