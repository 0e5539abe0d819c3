"""Settings, replica counts and checkpoints that change under load: nothing may fail, and no answer may mix two checkpoints."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipfleet.load import image_request
from faults.chaos import CLIENTS, pictures, row_of
from faults.report import Row
from faults.served import Served, config, serve
from faults.traffic import Picture, traffic
from tests.checkpoints import make_clip

LISTED = 4  # images of a request that has several


def lists(shown: Sequence[Picture], length: int = LISTED) -> list[Picture]:
    """Requests of several images each, which are decoded and encoded in several calls."""
    made = []
    for start in range(0, len(shown) - length + 1, length):
        group = shown[start : start + length]
        request = image_request([picture.body for picture in group])
        vectors = {name: np.concatenate([one.vectors[name] for one in group]) for name in group[0].vectors}
        made.append(Picture(request.body, vectors, request.headers["Content-Type"]))
    return made


def change(served: Served, shown: Sequence[Picture], what: str, settings: dict[str, Any]) -> Row:
    """Change over to other settings under load."""
    with traffic(served.port, shown, CLIENTS) as seen:
        time.sleep(3)
        began = time.monotonic()
        said = served.reload(settings)
        took = time.monotonic() - began
        time.sleep(5)
    changed = "nothing was changed" not in said
    print(f"{time.strftime('%T')} {what}: {said.strip()}", flush=True)
    row = row_of(f"{what}, tiny", int(changed), seen)
    fingerprints = ", ".join(f"{name} {count}" for name, count in seen.fingerprints.items())
    return replace(row, outcome=f"{row.outcome}; done after {took:.0f} s; answers by fingerprint: {fingerprints}")


def measure() -> list[Row]:
    """Every kind of change, by SIGHUP."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        other = make_clip(Path(folder, "other"))
        single = pictures("tiny", other)
        shown = [*single[:48], *lists(single[48:])]
        one = {"Ingress": 1, "ImageDecoder": 1, "ImageEncoder": 1}
        four = {"Ingress": 4, "ImageDecoder": 4, "ImageEncoder": 4}
        with serve(config(one, model="tiny"), None) as served:
            for what, settings in (
                ("1 replica to 4 of each deployment", config(four, model="tiny")),
                ("4 replicas to 1", config(one, model="tiny")),
                ("other limits", config(one, model="tiny", limits={"deadline_s": 20})),
                ("another checkpoint", config(one, model=str(other))),
                ("the first checkpoint again", config(one, model="tiny")),
            ):
                rows.append(change(served, shown, what, settings))
            batch = config(one, model="tiny")
            for deployment in batch["applications"][0]["deployments"]:
                if deployment["name"].endswith("Encoder"):
                    deployment["user_config"] = {"max_batch_size": 8, "batch_wait_timeout_s": 0.0}
            rows.append(change(served, shown, "another batch size (reconfigure)", batch))
    return rows
