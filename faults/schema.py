"""Requests made from /openapi.json, good and bad ones: no server error, and every answer as the document says."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from faults.report import Row
from faults.served import config, serve

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = 300
PORT = 8490


@dataclass(frozen=True)
class Checked:
    """What came of a run. `said` is Schemathesis' own report, which names each failure with a request that shows it."""

    good: bool
    statuses: Counter[int]
    said: str

    def __str__(self) -> str:
        return ", ".join(f"{status} {count}" for status, count in sorted(self.statuses.items()))


def check(url: str, examples: int, seed: int) -> Checked:
    """Hold the service at `url` to its document, by so many random examples for each route beside those at its edges."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "events.ndjson")
        command = [
            sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", CONFIG, "run", f"{url}/openapi.json",
            "--phases", "coverage,fuzzing", "--max-examples", examples, "--seed", seed, "--continue-on-failure",
            "--generation-database", "none", "--request-timeout", 30, "--report-ndjson-path", report,
        ]  # fmt: skip
        done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=3000)
        statuses = _statuses(report) if report.exists() else Counter()
    return Checked(done.returncode == 0 and bool(statuses), statuses, done.stdout + done.stderr)


def _statuses(report: Path) -> Counter[int]:
    found: Counter[int] = Counter()
    for line in report.read_text().splitlines():
        for event in json.loads(line).values():
            for sent in event.get("recorder", {}).get("interactions", {}).values():
                if sent["response"] is not None:
                    found[sent["response"]["status_code"]] += 1
    return found


def measure(seed: int) -> list[Row]:
    with serve(config({}), "tiny", PORT) as served:
        checked = check(f"http://127.0.0.1:{served.port}", EXAMPLES, seed)
        alive = served.ready()
    if not checked.good:
        print(checked.said, flush=True)
    outcome = f"{checked}; /readyz {'200' if alive else 'not 200'} afterwards"
    fault = f"requests made from /openapi.json, seed {seed}"
    return [Row(fault, "one client", checked.statuses.total(), outcome, checked.good and alive)]
