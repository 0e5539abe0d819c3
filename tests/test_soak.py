"""How `make soak` judges what it measured."""

from __future__ import annotations

import numpy as np
import pytest

from faults import soak

MINUTES = 30


def samples(mb_an_hour: float, noise: float = 4.0) -> soak.Samples:
    """The memory of a steady process and of one that grows after the warm-up, which it begins small."""
    rng = np.random.default_rng(3)
    times = np.arange(0, MINUTES * 60, soak.EVERY_S)
    warm = np.minimum(times / (soak.WARM_UP * times[-1]), 1) * 200
    steady = list(zip(times.tolist(), (300 + rng.exponential(noise, len(times))).tolist(), strict=True))
    grown = 100 + warm + mb_an_hour * times / 3600 + rng.exponential(noise, len(times))
    return {"memory": {"steady 1": steady, "Decoder 2": list(zip(times.tolist(), grown.tolist(), strict=True))}}


@pytest.mark.parametrize(("mb_an_hour", "kept"), [(0, True), (40, False), (-40, True)])
def test_growth_after_the_warm_up_is_found_within_its_noise(mb_an_hour: float, kept: bool) -> None:
    row = soak._trend(samples(mb_an_hour))
    assert row.kept is kept
    assert "2 processes" in row.load
    slope = float(row.outcome.split("Decoder 2 ")[1].split(" ")[0])
    assert slope == pytest.approx(mb_an_hour, abs=4)


def test_what_is_too_short_to_be_judged_is_not_kept() -> None:
    few = {name: points[: int(300 / soak.EVERY_S)] for name, points in samples(0)["memory"].items()}
    row = soak._trend({"memory": few})
    assert not row.kept
    assert "too short" in row.outcome


def test_a_few_seconds_of_a_minute_do_not_count() -> None:
    points = [(58.0, 900.0), *((60.0 + 5 * number, 100.0 + number) for number in range(12)), (120.0, 800.0)]
    assert soak._least_of_minutes(points) == {1: 100.0}


def test_descriptors_that_stay_are_found() -> None:
    times = np.arange(0, MINUTES * 60, soak.EVERY_S).tolist()
    for more, kept in ((soak.MORE, True), (soak.MORE + 1, False)):
        points = [(at, 50.0 + more * (at > 0.7 * times[-1])) for at in times]
        assert soak._leak({"descriptors": {"Ingress 1": points}}, "descriptors").kept is kept
