"""DEST where it cannot be claimed: one line that names it and the cause."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from clipfleet.errors import JobError
from jobs.destination import claim
from jobs.summary import STOPPED, exit_status
from tests.jobs.job import embed


def test_a_gate_that_cannot_be_written(tmp_path: Path, picture_files: list[Path]) -> None:
    """Through the command, which ends with a line and no traceback."""
    (tmp_path / ".clipfleet" / "gate").mkdir(parents=True)
    done = embed(picture_files[0].parent, tmp_path)
    assert done.status == STOPPED
    assert done.err == f"clipfleet: cannot write to DEST {str(tmp_path)!r}: Is a directory\n"


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX], ids=["lock", "gate"])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    def flock(file: object, operation: int) -> None:
        if operation == kind:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(JobError, match=r"cannot write to DEST .*: No locks available") as refused, claim(str(tmp_path)):
        pass
    assert str(tmp_path) in str(refused.value) and exit_status(refused.value) == STOPPED
