"""The job with its encoders on an NVIDIA GPU. Skipped where torch finds none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.jobs.job import embed, read, summary, vectors
from tests.library import Library

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize(
    ("options", "lowest_cosine"),
    [((), 0.999999), (("--device", "cuda", "--precision", "float16"), 0.9999)],
    ids=["auto takes it", "float16"],
)
def test_rows_are_the_librarys(
    options: tuple[str, ...], lowest_cosine: float, picture_files: list[Path], library: Library, tmp_path: Path
) -> None:
    done = embed(picture_files[0].parent, tmp_path, *options)
    assert done.status == 0, done.err
    assert summary(tmp_path)["engine"] == "torch"
    found = vectors(read(tmp_path))
    expected = library.images([file.read_bytes() for file in picture_files])
    assert sorted(found) == [file.name for file in picture_files]
    cosines = [
        (found[file.name] * row).sum() for file, row in zip(picture_files, expected.astype(np.float64), strict=True)
    ]
    assert min(cosines) >= lowest_cosine
