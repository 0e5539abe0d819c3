"""How many failed rows a finished job may have before it counts as a failure itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from clipfleet.errors import SettingsError


@dataclass(frozen=True)
class Tolerance:
    """A number of rows, or a share of all rows of DEST in percent. More failed rows than that are too many."""

    most: Fraction
    in_percent: bool

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Read `N` or `N%`. Raises SettingsError for anything else."""
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(%?)", text.strip())
        number, percent = found.groups() if found else ("", "")
        most = Fraction(number or 0)
        if not found or (most > 100 if percent else "." in number):
            raise SettingsError(f"max_failures is a number of rows, such as 50, or a share, such as 0.5%; not {text!r}")
        return cls(most, bool(percent))

    def __str__(self) -> str:
        return f"{float(self.most):g}%" if self.in_percent else str(self.most)

    def exceeded(self, failed: int, rows: int) -> bool:
        """Whether `failed` of `rows` are too many."""
        return failed > (self.most * rows / 100 if self.in_percent else self.most)

    def verdict(self, failed: int, rows: int) -> str | None:
        """One line where they are too many, otherwise None."""
        if not self.exceeded(failed, rows):
            return None
        return (
            f"{failed} of {rows} rows failed, and --max-failures allows {self}. All rows are written; mend the images, "
            "then start the same command with --retry-errors"
        )
