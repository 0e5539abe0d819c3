"""DEST as a place that one job at a time writes to, and in which files appear whole or not at all.

    DEST/part-*.parquet, DEST/_clipfleet.json     the output
    DEST/.clipfleet/lock                          locked by the job's process for as long as it lives
    DEST/.clipfleet/gate                          holds the token of the job that may publish
    DEST/.clipfleet/run-TOKEN/                    a job's scratch files; gone when it ends

The workers of a killed job may live on for seconds. Each of them compares its token with the gate, under a shared
lock, right before it renames a file into place. A new job changes the token under the exclusive lock before it
looks at what is there, so what it has seen stays true.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipfleet.errors import JobError, SettingsError

GO_ON = "What is finished is kept; the same command goes on from there"
_PRIVATE = ".clipfleet"


@dataclass(frozen=True)
class Claim:
    """The right of one run to publish files in `folder`. Workers get a copy."""

    folder: Path
    token: str

    @property
    def scratch(self) -> Path:
        return self.folder / _PRIVATE / f"run-{self.token}"

    def publish(self, file: Path, name: str) -> None:
        """Move a finished file of the same file system to `name`. Raises JobError if another run has taken over."""
        with file.open("rb") as content:
            os.fsync(content.fileno())  # or a power failure could leave an empty file under the final name
        with self._gate():
            os.replace(file, self.folder / name)

    def remove(self, name: str) -> None:
        """Remove an output file. Raises JobError if another run has taken over."""
        with self._gate():
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def _gate(self) -> Iterator[None]:
        with (self.folder / _PRIVATE / "gate").open("r") as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
            if gate.read() != self.token:
                raise JobError(f"another job has taken over {str(self.folder)!r}")
            yield


@contextmanager
def claim(dest: str) -> Iterator[Claim]:
    """Make DEST and hold it. Raises SettingsError if it can be no folder, JobError if it cannot be written or is held."""
    folder = Path(dest).expanduser().absolute()
    if "://" in dest:
        raise SettingsError(f"DEST must be a local folder, not {dest!r}")
    private = folder / _PRIVATE
    try:
        private.mkdir(parents=True, exist_ok=True)
        lock = (private / "lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise SettingsError(f"DEST {str(folder)!r} is no folder") from None
    except OSError as error:
        raise _cannot_claim(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"another job is writing to {str(folder)!r}; wait for it, or choose another DEST") from None
        except OSError as error:  # a file system without locks
            raise _cannot_claim(folder, error) from error
        claimed = Claim(folder, secrets.token_hex(8))
        try:
            _shut_others_out(claimed)
        except OSError as error:
            raise _cannot_claim(folder, error) from error
        try:
            yield claimed
        finally:
            shutil.rmtree(claimed.scratch, ignore_errors=True)


def _cannot_claim(folder: Path, error: OSError) -> JobError:
    return JobError(f"cannot write to DEST {str(folder)!r}: {error.strerror or error}")


def _shut_others_out(claimed: Claim) -> None:
    private = claimed.folder / _PRIVATE
    with (private / "gate").open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # waits for a rename in flight
        gate.truncate(0)
        gate.write(claimed.token)
    for leftover in private.glob("run-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    claimed.scratch.mkdir(mode=0o700)  # its tasks name sources as they were given, with keys that stand in their URIs
