"""Sources in an object store: rclone speaks S3 on loopback."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from clipfleet.errors import SettingsError
from deployments.private_ray import unreachable
from jobs.places import known_filesystem
from jobs.sources import open_files
from tests.deployments.processes import until
from tests.deployments.service import BIN, free_ports
from tests.jobs.job import embed, errors, read, vectors
from tests.jobs.planned import embedded, planned
from tests.jobs.test_tars import make_tar

SECRET = "the-secret"


class Bucket:
    """A bucket of a running server, whose objects are the files of a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.query = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        self._folder = folder

    def uri(self, path: str) -> str:
        return f"s3://key:{SECRET}@pictures/{path}{self.query}"

    def put(self, path: str, data: bytes, modified_ns: int | None = None) -> None:
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if modified_ns is not None:
            os.utime(file, ns=(modified_ns, modified_ns))

    def delete(self, path: str) -> None:
        (self._folder / path).unlink()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    root = tmp_path_factory.mktemp("s3")
    (root / "pictures").mkdir()
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [BIN / "rclone", "serve", "s3", "--config", "", "--auth-key", f"key,{SECRET}", "--addr", address,
               "--dir-cache-time", "0s", root]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: unreachable(address) is None, 60, "a server that answers")
        yield Bucket(root / "pictures", port)
    finally:
        server.kill()
        server.wait()


def test_a_folder_and_what_changes_in_it(bucket: Bucket, tmp_path: Path, files: list[bytes]) -> None:
    names = ["a.png", "sub/b 1.png", "sub/ü#%41.png"]
    for name, data in zip(names, files, strict=False):
        bucket.put(f"folder/{name}", data)
    bucket.put("folder/notes.txt", b"no image, and no row")
    bucket.put("folder/bad.png", b"no image")
    done = embed(bucket.uri("folder"), tmp_path)
    assert done.status == 3, done.err
    table = read(tmp_path)
    assert vectors(table).keys() == {*names} and errors(table) == {"bad.png": "image_format_unsupported"}
    assert all(
        SECRET not in str(value) for row in table.drop_columns(["embedding"]).to_pylist() for value in row.values()
    )
    states = {row["id"]: row for row in table.to_pylist()}
    assert states["a.png"]["size"] == len(files[0]) and states["a.png"]["modified"] is not None

    time.sleep(1.1)  # S3 keeps whole seconds
    bucket.put("folder/a.png", files[0])
    bucket.delete("folder/sub/b 1.png")
    assert embedded(bucket.uri("folder"), tmp_path, changed=True) == ["a.png"]
    ids = [name for part in tmp_path.glob("part-*") for name in pq.read_table(part, columns=["id"])["id"].to_pylist()]
    assert sorted(ids) == sorted([*names, "bad.png"])
    assert embedded(bucket.uri("folder"), tmp_path, changed=True) == []


def test_globs_are_relative_to_their_folder(bucket: Bucket, files: list[bytes]) -> None:
    for name in ("2023/a.png", "2024/b.png", "2024/c.jpg"):
        bucket.put(f"years/{name}", files[0])
    found = list(open_files(bucket.uri("years/*/*.png")).items)
    assert [item.id for item in found] == ["2023/a.png", "2024/b.png"]
    assert found[0].uri == f"s3://pictures/years/2023/a.png{bucket.query}"
    with pytest.raises(SettingsError, match="there is no folder") as refused:
        open_files(bucket.uri("nothing"))
    assert SECRET not in str(refused.value)


def test_a_manifest_of_objects(bucket: Bucket, tmp_path: Path, files: list[bytes]) -> None:
    bucket.put("m/a.png", files[0])
    bucket.put("m/b.png", files[1])
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,sku\n" + "".join(f"{bucket.uri(f'm/{name}.png')},{name}\n" for name in "abc"))
    options = {"id_column": "sku"}
    assert embedded(manifest, tmp_path / "out", **options) == ["a", "b", "c"]
    table = read(tmp_path / "out")
    assert errors(table) == {"c": "file_not_found"} and SECRET not in str(table.column("uri").to_pylist())
    assert embedded(manifest, tmp_path / "out", changed=True, **options) == []
    time.sleep(1.1)
    bucket.put("m/a.png", files[0])
    bucket.put("m/c.png", files[2])
    bucket.delete("m/b.png")
    assert embedded(manifest, tmp_path / "out", changed=True, **options) == ["a", "c"]
    assert errors(read(tmp_path / "out")) == {"b": "gone"}


def test_a_manifest_must_be_a_local_file(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("m/list.csv", b"path\na.png\n")
    for options in ({}, {"path_column": "path"}):
        with (
            pytest.raises(SettingsError, match="a manifest must be a local file") as refused,
            planned(bucket.uri("m/list.csv"), tmp_path, **options),
        ):
            pass
        assert SECRET not in str(refused.value)


def test_times_that_pyarrow_cannot_read_are_unknown(bucket: Bucket, tmp_path: Path, files: list[bytes]) -> None:
    """The server cuts zeros off the end of a time: 12:00:00.04Z has two digits."""
    images = {"0.png": files[0], "1.png": files[1]}
    bucket.put("odd/s.tar", make_tar(tmp_path / "s.tar", images).read_bytes(), modified_ns=1_700_000_000_040_000_000)
    filesystem, _ = known_filesystem(bucket.uri("odd"))
    assert filesystem.get_file_info("pictures/odd/s.tar").mtime_ns > 0
    (listed,) = filesystem.get_file_info(fs.FileSelector("pictures/odd"))
    assert listed.mtime_ns == 0, "this test shows nothing: pyarrow reads it now"
    assert embedded(bucket.uri("odd"), tmp_path / "out") == ["s.tar/0.png", "s.tar/1.png"]
    assert errors(read(tmp_path / "out")) == {}
    assert embedded(bucket.uri("odd"), tmp_path / "out", changed=True) == []


def test_tars(bucket: Bucket, tmp_path: Path, files: list[bytes]) -> None:
    tar = make_tar(tmp_path / "s.tar", {f"{number}.png": data for number, data in enumerate(files)}).read_bytes()
    bucket.put("tars/a.tar", tar)
    bucket.put("tars/b.tar", tar[: len(tar) // 2])
    ids = embedded(bucket.uri("tars"), tmp_path / "out")
    assert ids[:12] == [f"a.tar/{number}.png" for number in range(12)] and ids[-1] == "b.tar"
    assert errors(read(tmp_path / "out")) == {"b.tar": "file_unreadable"}
    assert embedded(bucket.uri("tars/a.tar"), tmp_path / "one") == ids[:12]
    with planned(bucket.uri("tars/a.tar"), tmp_path / "replaced", rows_per_file=4) as run:
        decoded = run.decoded()
        assert errors(next(decoded)[0]) == {}
        time.sleep(1.1)
        bucket.put("tars/a.tar", tar)  # of the same size
        later = [errors(rows) for rows, _ in decoded]
        assert later[-1] == dict.fromkeys(ids[8:12], "file_unreadable"), "through a connection that was open"
    uri = read(tmp_path / "one").column("uri")[0].as_py()
    assert uri == f"s3://pictures/tars/a.tar/0.png{bucket.query}"
