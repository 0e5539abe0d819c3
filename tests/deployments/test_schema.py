"""The service and /openapi.json agree: the short form of `python -m faults schema`."""

from __future__ import annotations

from faults.schema import check
from tests.deployments.service import Service


def test_every_answer_is_as_documented(service: Service) -> None:
    checked = check(service.url, examples=20, seed=20)
    assert checked.good, checked.said
    assert set(checked.statuses) <= {200, 400, 404, 405, 413, 415, 422, 504}
    assert checked.statuses[200] > 20 and checked.statuses[400] > 100
