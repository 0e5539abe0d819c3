"""Settings of the service: what is refused, and what the environment adds."""

from __future__ import annotations

from typing import Any

import pytest

from clipfleet.errors import SettingsError
from clipfleet.keys import hashed
from clipfleet.settings import service_settings


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"modell": "tiny"}, "args.modell: there is no such setting; did you mean model?"),
        (
            {"search": {"qdrant": "index", "api_key": "k"}},
            "api_key: there is no such setting; did you mean qdrant_api_key?",
        ),
        ({"limits": 5}, "args.limits: Input should be an object"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"precision": "int4"}, "args.precision"),
        ({"gpus_per_replica": 0}, "args.gpus_per_replica"),
        ({"cors_origins": ["shop.example"]}, "'shop.example' is no origin"),
        ({"cors_origins": ["https://shop.example/page"]}, "is no origin"),
        ({"cors_origins": ["https://*.example"]}, "is no origin"),
        ({"api_keys": ["two\nlines"]}, "printable ASCII"),
        ({"limits": {"image_bytes": -1}}, "args.limits.image_bytes"),
        ({"limits": {"image_formats": ["PNG", "SVG"]}}, "SVG"),
        ({"api_keys": [""]}, "args.api_keys"),
        ({"model": 7}, "args.model"),
    ],
)
def test_wrong_args_are_named(args: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError) as refused:
        service_settings({"model": "tiny", **args})
    assert word in refused.value.message


def test_a_setting_in_the_wrong_place_is_not_told_itself() -> None:
    with pytest.raises(SettingsError, match=r"args\.qdrant: there is no such setting$"):
        service_settings({"model": "tiny", "qdrant": "index"})


def test_origins_are_written_as_browsers_write_them() -> None:
    given = ["https://Shop.Example:443", "http://a:80", "http://a:443", "https://[::1]:8080", "*"]
    found = service_settings({"model": "tiny", "cors_origins": given}).cors_origins
    assert found == ("https://shop.example", "http://a", "http://a:443", "https://[::1]:8080", "*")


def test_keys_come_from_file_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFLEET_API_KEYS", "two, three,,")
    assert service_settings({"model": "tiny", "api_keys": ["one"]}).api_keys == tuple(
        map(hashed, ("one", "two", "three"))
    )
    monkeypatch.delenv("CLIPFLEET_API_KEYS")
    assert service_settings({"model": "tiny"}).api_keys == ()


@pytest.mark.parametrize("keys", ["secret", 5, {"a": 1}])
def test_keys_must_be_a_list_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    """Spread into a list, a string would become keys of one letter."""
    monkeypatch.setenv("CLIPFLEET_API_KEYS", "real")
    with pytest.raises(SettingsError, match="api_keys"):
        service_settings({"model": "tiny", "api_keys": keys})


@pytest.mark.parametrize(
    "args",
    [
        {"precision": "int8", "engine": "torch"},
        {"device": "cuda", "engine": "openvino"},
        {"device": "cuda", "precision": "int8"},
        {"precision": "float16", "engine": "openvino"},
    ],
)
def test_engines_that_cannot_are_refused_before_anything_starts(args: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="openvino"):
        service_settings({"model": "tiny", **args})


@pytest.mark.parametrize(
    "args",
    [
        {"api_keys": "topsecret"},
        {"api_keys": ["topsecret", "topsecret "]},
        {"api_keys": ["topsecret", 3]},
        {"api_keys": ["topsecret"], "engine": "openvino", "device": "cuda"},
        {"api_keys": ["topsecret"], "gpus": 3},
    ],
)
def test_no_message_shows_a_key(args: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        service_settings(args)
    assert "topsecret" not in str(caught.value) and "args" in str(caught.value)
