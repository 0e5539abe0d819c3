"""--tls with a file that is no certificate. What it does with one: test_secured.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployments.processes import private_folder
from tests.deployments.service import BIN, running


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_is_no_certificate(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tls.pem"
    if content is not None:
        file.write_text(content)
    with (
        private_folder() as folder,
        running(BIN / "clipfleet", "serve", "demo", "--tls", str(file), folder=folder) as command,
    ):
        assert command.wait(60) == 1
        assert "tls.pem" in command.err and "certificate" in command.err
