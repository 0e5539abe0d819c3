"""The service and /openapi.json agree: the short form of `python -m faults schema`."""

from __future__ import annotations

import re
from collections import defaultdict

import httpx

from faults.schema import check
from tests.deployments.service import ROOT, Service


def test_every_answer_is_as_documented(service: Service) -> None:
    checked = check(service.url, examples=20, seed=20)
    assert checked.good, checked.said
    assert set(checked.statuses) <= {200, 400, 404, 405, 413, 415, 422, 504}
    assert checked.statuses[200] > 20 and checked.statuses[400] > 100


def test_the_codes_of_each_status_are_documented(http: httpx.Client) -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (`[^|]+) \|", (ROOT / "docs" / "http.md").read_text(), re.MULTILINE)
    listed: dict[str, set[str]] = defaultdict(set)
    for statuses, codes in rows:
        for status in statuses.split(", "):
            listed[status] |= set(re.findall(r"`(\w+)`", codes))
    page = http.get("/docs").text
    answers = http.get("/openapi.json").json()["paths"]["/v1/embeddings"]["post"]["responses"]
    for status in answers.keys() - {"200"}:
        _, _, codes = answers[status]["description"].rstrip(".").partition("Codes: ")
        assert set(codes.split(", ")) == listed[status], status
        assert f"Codes: {codes}" in page
    assert listed.keys() - answers.keys() == {"405"}
