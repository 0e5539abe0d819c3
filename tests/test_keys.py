"""API keys in a file: shown once, kept as hashes, replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfleet.errors import SettingsError
from clipfleet.keys import KeyRing, add_key, digest, read_keys, revoke_key
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


def test_a_revoked_key_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "one")
    add_key(file, "two")
    revoke_key(file, "one")
    assert list(read_keys(file)) == ["two"]
    assert KeyRing((), str(file)).name_of(key) is None
    with pytest.raises(SettingsError, match="there is no key 'one'; there are two"):
        revoke_key(file, "one")


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
