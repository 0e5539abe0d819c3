"""What a run came to: the words on the terminal, `_clipfleet.json`, and the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipfleet.errors import ClipfleetError, SettingsError

FINISHED, STOPPED, WRONG_USAGE, FINISHED_WITH_FAILURES = 0, 1, 2, 3


@dataclass(frozen=True)
class Summary:
    """`rows`, `embedded`, `failed`, `gone` and `errors` describe the finished DEST; `skipped` (inputs that were finished
    before), `seconds`, `startup_seconds` (until an encoder was ready) and `images_per_second` (from then on) describe
    this run. `verdict` is one line if more rows failed than may, and stands in no file."""

    rows: int
    embedded: int
    failed: int
    gone: int
    skipped: int
    errors: dict[str, int]
    images_per_second: float
    seconds: float
    startup_seconds: float
    fingerprint: str
    model: str
    precision: str
    engine: str
    jpegs: str
    verdict: str | None = None

    @property
    def exit_status(self) -> int:
        if self.verdict:
            return STOPPED
        return FINISHED_WITH_FAILURES if self.failed else FINISHED

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "verdict"}

    def __str__(self) -> str:
        gone = f", {self.gone} gone" if self.gone else ""
        lines = [f"{self.rows} rows: {self.embedded} embedded, {self.failed} failed{gone}"]
        lines += [f"  {number} {code}" for code, number in self.errors.items()]
        if self.failed:
            lines.append("the rows whose `error` is not null name what failed; --retry-errors does those again")
        if self.images_per_second:
            times = f"after {self.startup_seconds:.1f} s to start, {self.seconds:.1f} s in all"
            lines.append(f"{self.images_per_second:.1f} images/s {times}")
        else:
            lines.append("nothing to do: every input was finished before")
        if "," in self.precision + self.engine + self.jpegs:
            settings = f"precision {self.precision}; engine {self.engine}; JPEGs {self.jpegs}"
            lines.append(f"made in part by different settings: {settings}")
        if self.skipped and self.images_per_second:
            lines.append(f"{self.skipped} inputs were finished before and skipped")
        return "\n".join(lines)


def exit_status(error: ClipfleetError) -> int:
    """The status to end with when a run raised `error`."""
    return WRONG_USAGE if isinstance(error, SettingsError) else STOPPED
