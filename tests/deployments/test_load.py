"""Load on a service, from the library and by `clipfleet bench`: every request counted, failures by their status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipfleet.errors import SettingsError, Unavailable
from clipfleet.load import Request, image_request, json_request, run_load
from tests.deployments.broken import BROKEN
from tests.deployments.service import Service
from tests.test_cli import run


def test_items_and_failures_are_counted(service: Service, files: list[bytes]) -> None:
    answered: list[int] = []
    requests = [
        image_request(files[:1]), image_request(files[:5]), json_request(files[:2], ["a red circle"]),
        image_request([BROKEN["cut JPEG"].data]), Request("/nowhere", {}, b""),
    ]  # fmt: skip
    load = run_load(service.url, requests * 4, 8, advance=answered.append)
    assert (load.requests, load.items, sum(answered)) == (20, 4 * (1 + 5 + 3), 20)
    assert load.failures == {"422": 4, "404": 4}
    assert 0 < load.p50 <= load.p90 <= load.p99 <= load.seconds
    assert load.rate == load.items / load.seconds
    assert "4 answered 422" in str(load) and load.first_failure


def test_a_key_that_no_header_holds(service: Service) -> None:
    with pytest.raises(SettingsError, match="API key") as refused:
        run_load(service.url, [json_request(texts=["a"])], 1, api_key="a secret\r")
    assert "secret" not in str(refused.value)


def test_nobody_there_and_no_address() -> None:
    with pytest.raises(Unavailable, match="nobody listens at 127"):
        run_load("http://127.0.0.1:9", [], 1)
    for address in ("somewhere", "http://127.0.0.1:80a", "http://[x"):
        with pytest.raises(SettingsError, match="no address of a service"):
            run_load(address, [], 1)


@pytest.mark.parametrize("more", [["--texts", "--items", "3"], ["--items", "2"]], ids=["texts", "images"])
def test_the_command(service: Service, picture_files: list[Path], more: list[str]) -> None:
    images = [] if "--texts" in more else picture_files[:3]
    done = run("bench", service.url, *images, "--requests", "12", "--clients", "4", *more)
    assert done.returncode == 0, done.stderr
    assert "(12 requests)" in done.stdout and "p99" in done.stdout
    assert "12/12" in done.stderr, "a progress bar"
    printed = json.loads(run("bench", service.url, *images, "--requests", "4", *more, "--json").stdout)
    assert printed["requests"] == 4 and printed["items"] in (8, 12) and 0 < printed["p50"] <= printed["p99"]


def test_the_command_ends_with_3_where_requests_fail(service: Service, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(BROKEN["cut JPEG"].data)
    done = run("bench", service.url, tmp_path / "broken.jpg", "--requests", "4")
    assert done.returncode == 3 and "4 answered 422" in done.stdout
    assert "none of 4 requests" in done.stdout and "nan" not in done.stdout
    assert "The first failure: the JPEG is truncated or damaged" in done.stdout
    printed = json.loads(run("bench", service.url, tmp_path / "broken.jpg", "--requests", "1", "--json").stdout)
    assert printed["failures"] == {"422": 1} and printed["p50"] is None
