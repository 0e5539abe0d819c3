"""CLIPEmbedder and CLIPModel as the seed page (tests/data/seed-clip-module.md) describes them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipfleet.embedder
from app.models.clip_model import CLIPEmbedder, CLIPModel
from clipfleet.errors import CheckpointNotFound, Closed, DeviceUnavailable, ImageNotFound, SettingsError
from tests.checkpoints import TINY

PATIENCE = 60  # seconds until something that never happens counts as failed; no test waits for it otherwise
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture(scope="module")
def embedder() -> Iterator[CLIPEmbedder]:
    with CLIPEmbedder("tiny", "cpu") as embedder:
        yield embedder


def image_tower(embedder: CLIPEmbedder) -> Any:
    return embedder._encoder._models["image"]


class Hooked:
    """An image tower that does something before each forward pass."""

    def __init__(self, embedder: CLIPEmbedder, before: Callable[[], None]) -> None:
        self._tower, self._before = image_tower(embedder), before
        embedder._encoder._models["image"] = self

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self._before()
        return self._tower(pixels)


def embed(embedder: CLIPEmbedder, files: list[Path], **options: Any) -> list[np.ndarray | None]:
    return asyncio.run(embedder.generate_embeddings_batch(files, **{"show_progress": False, **options}))


def matrix(vectors: list[np.ndarray | None]) -> np.ndarray:
    assert all(vector is not None for vector in vectors)
    return np.stack(vectors)  # type: ignore[arg-type]


class TestCLIPEmbedderInitialization:
    def test_signature_is_the_seed_pages(self) -> None:
        parameters = inspect.signature(CLIPEmbedder).parameters.items()
        assert {name: p.default for name, p in parameters if p.kind is not p.KEYWORD_ONLY} == {
            "model_name": "openai/clip-vit-base-patch32",
            "device": "auto",
        }

    def test_seed_path_gives_the_librarys_own_classes(self) -> None:
        assert CLIPEmbedder is clipfleet.embedder.CLIPEmbedder is clipfleet.CLIPEmbedder
        assert CLIPModel is clipfleet.embedder.CLIPModel is clipfleet.CLIPModel

    def test_auto_takes_a_gpu_where_there_is_one(self) -> None:
        with CLIPEmbedder("tiny") as embedder:
            assert embedder.device.startswith("cuda" if torch.cuda.is_available() else "cpu")

    def test_a_folder_is_a_model_name(self, checkpoints: dict[str, Path]) -> None:
        with CLIPEmbedder(str(checkpoints["siglip"]), "cpu") as embedder:
            assert embedder.get_embedding_dimension() == 28
            assert embedder.encode_text("a red circle").shape == (28,)

    def test_repr_says_what_it_is(self, embedder: CLIPEmbedder) -> None:
        assert repr(embedder) == "CLIPEmbedder('tiny', device='cpu')"

    @needs_no_gpu
    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
    def test_cuda_without_a_gpu_names_the_device_and_auto(self, device: str) -> None:
        with pytest.raises(DeviceUnavailable, match=f"'{device}' is not available.*'auto'"):
            CLIPEmbedder("tiny", device)

    @pytest.mark.parametrize("device", ["gpu", "tpu:0", "mps", "cuda:x", ""])
    def test_unknown_devices_are_refused_by_name(self, device: str) -> None:
        with pytest.raises(SettingsError, match=f"device '{device}'.*auto, cpu, cuda"):
            CLIPEmbedder("tiny", device)


class TestLogging:
    def test_initialisation_logs_info_then_success(self, log: list[tuple[str, str]]) -> None:
        CLIPEmbedder("tiny", "cpu").close()
        assert [level for level, _ in log] == ["INFO", "SUCCESS"]
        assert all("tiny" in message for _, message in log)

    def test_a_checkpoint_that_cannot_be_loaded_is_an_error(self, log: list[tuple[str, str]], tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFound):
            CLIPEmbedder(str(tmp_path / "nowhere"))
        assert [level for level, _ in log] == ["INFO", "ERROR"]

    def test_missing_and_corrupt_files_are_warnings_that_name_them(
        self, embedder: CLIPEmbedder, log: list[tuple[str, str]], tmp_path: Path
    ) -> None:
        (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
        embed(embedder, [tmp_path / "missing.jpg", tmp_path / "corrupt.jpg"])
        warned = sorted(message for level, message in log if level == "WARNING")
        assert len(warned) == 2 and "corrupt.jpg" in warned[0] and "missing.jpg" in warned[1]
        assert ("INFO", "Embedded 0 of 2 images, 2 failed") in log

    def test_a_single_image_is_a_detail(
        self, embedder: CLIPEmbedder, log: list[tuple[str, str]], picture_files: list[Path]
    ) -> None:
        asyncio.run(embedder.generate_embedding(picture_files[0]))
        assert log == [("DEBUG", f"Embedded {picture_files[0]}")]

    def test_a_text_that_is_cut_is_a_warning(self, embedder: CLIPEmbedder, log: list[tuple[str, str]]) -> None:
        embedder.encode_text(["short", "long " * 100])
        assert log == [("WARNING", "1 of 2 texts were cut at 77 tokens")]


class TestGenerateEmbedding:
    def test_signature_is_the_seed_pages(self) -> None:
        assert inspect.iscoroutinefunction(CLIPEmbedder.generate_embedding)
        assert list(inspect.signature(CLIPEmbedder.generate_embedding).parameters) == ["self", "image_path"]

    def test_gives_a_unit_vector(self, embedder: CLIPEmbedder, picture_files: list[Path]) -> None:
        vector = asyncio.run(embedder.generate_embedding(str(picture_files[0])))
        assert vector is not None and vector.shape == (512,) and vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    def test_a_missing_file_raises_file_not_found(self, embedder: CLIPEmbedder, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nonexistent\.jpg") as caught:
            asyncio.run(embedder.generate_embedding(str(tmp_path / "nonexistent.jpg")))
        assert isinstance(caught.value, ImageNotFound)

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0\0\x10JFIF"])
    def test_an_undecodable_file_gives_none(self, embedder: CLIPEmbedder, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.jpg").write_bytes(content)
        assert asyncio.run(embedder.generate_embedding(tmp_path / "bad.jpg")) is None

    def test_a_folder_gives_none(self, embedder: CLIPEmbedder, tmp_path: Path) -> None:
        assert asyncio.run(embedder.generate_embedding(tmp_path)) is None


class TestGenerateEmbeddingsBatch:
    def test_signature_is_the_seed_pages(self) -> None:
        assert inspect.iscoroutinefunction(CLIPEmbedder.generate_embeddings_batch)
        parameters = inspect.signature(CLIPEmbedder.generate_embeddings_batch).parameters
        assert list(parameters) == ["self", "image_paths", "batch_size", "show_progress"]
        assert parameters["batch_size"].default == 32 and parameters["show_progress"].default is True

    @pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
    def test_vectors_come_in_order_whatever_the_batch(
        self, embedder: CLIPEmbedder, picture_files: list[Path], batch_size: int
    ) -> None:
        alone = matrix([asyncio.run(embedder.generate_embedding(file)) for file in picture_files])
        assert np.abs(alone[:, None] - alone[None]).max(2)[~np.eye(12, dtype=bool)].min() > 1e-3, "pictures must differ"
        assert np.abs(matrix(embed(embedder, picture_files, batch_size=batch_size)) - alone).max() < 1e-5

    def test_none_stands_where_a_file_is_missing_or_corrupt(
        self, embedder: CLIPEmbedder, picture_files: list[Path], tmp_path: Path
    ) -> None:
        (tmp_path / "corrupt.png").write_bytes(picture_files[0].read_bytes()[:300])
        files = [picture_files[0], tmp_path / "missing.png", tmp_path / "corrupt.png", picture_files[1]]
        vectors = embed(embedder, files, batch_size=2)
        assert [vector is None for vector in vectors] == [False, True, True, False]
        assert np.abs(matrix(vectors[::3]) - matrix(embed(embedder, picture_files[:2]))).max() < 1e-5

    def test_an_empty_list_gives_an_empty_list(self, embedder: CLIPEmbedder) -> None:
        assert embed(embedder, []) == []

    def test_a_batch_size_below_one_is_refused(self, embedder: CLIPEmbedder, picture_files: list[Path]) -> None:
        with pytest.raises(SettingsError, match="batch_size must be at least 1, not 0"):
            embed(embedder, picture_files, batch_size=0)

    def test_the_bar_is_on_stderr_and_counts_images(
        self, embedder: CLIPEmbedder, picture_files: list[Path], capfd: pytest.CaptureFixture[str]
    ) -> None:
        asyncio.run(embedder.generate_embeddings_batch(picture_files, batch_size=5))
        out, err = capfd.readouterr()
        assert out == "" and "Embedding" in err and "12/12" in err

    def test_there_is_no_bar_when_none_is_wanted(
        self, embedder: CLIPEmbedder, picture_files: list[Path], capfd: pytest.CaptureFixture[str]
    ) -> None:
        embed(embedder, picture_files, show_progress=False)
        assert "Embedding" not in capfd.readouterr().err


class TestEncodeText:
    def test_a_string_gives_one_vector(self, embedder: CLIPEmbedder) -> None:
        vector = embedder.encode_text("a red sports car")
        assert vector.shape == (512,) and vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    def test_a_list_gives_a_row_each_in_order(self, embedder: CLIPEmbedder) -> None:
        texts = ["a red circle", "a long text about a blue ring on a green background", "x"]
        vectors = embedder.encode_text(texts)
        assert vectors.shape == (3, 512)
        assert np.abs(vectors - np.stack([embedder.encode_text(text) for text in texts])).max() < 1e-5

    def test_an_empty_list_gives_no_rows(self, embedder: CLIPEmbedder) -> None:
        vectors = embedder.encode_text([])
        assert vectors.shape == (0, 512) and vectors.dtype == np.float32

    @pytest.mark.parametrize("wrong", [[1], [None], ["a", b"b"]])
    def test_anything_else_is_a_type_error(self, embedder: CLIPEmbedder, wrong: Any) -> None:
        with pytest.raises(TypeError, match="a string or a list of strings"):
            embedder.encode_text(wrong)


def test_the_text_that_describes_a_picture_is_the_most_similar(embedder: CLIPEmbedder, tmp_path: Path) -> None:
    picture = Image.new("RGB", (224, 224), (40, 80, 214))
    picture.paste((214, 40, 40), (62, 62, 162, 162))
    picture.save(tmp_path / "square.png")
    image = asyncio.run(embedder.generate_embedding(tmp_path / "square.png"))
    assert image is not None
    texts = ["a red circle", "a red square", "a blue square", "a green star"]
    scores = [embedder.compute_similarity(vector, image) for vector in embedder.encode_text(texts)]
    assert texts[int(np.argmax(scores))] == "a red square"


def test_similarity_is_the_cosine_as_a_float(embedder: CLIPEmbedder) -> None:
    first, second = embedder.encode_text(["a red circle", "a black ring"])
    similarity = embedder.compute_similarity(first, second)
    assert type(similarity) is float and similarity == pytest.approx(float(first @ second), abs=1e-6)
    assert embedder.compute_similarity(first, first) == pytest.approx(1) and -1 <= similarity <= 1


def test_the_dimension_is_the_checkpoints(embedder: CLIPEmbedder) -> None:
    assert embedder.get_embedding_dimension() == 512


class TestRelease:
    def test_leaving_the_context_closes(self) -> None:
        with CLIPEmbedder("tiny", "cpu") as embedder:
            tower = weakref.ref(image_tower(embedder))
        gc.collect()
        assert tower() is None

    def test_closing_twice_is_harmless_and_every_use_afterwards_raises(self, picture_files: list[Path]) -> None:
        embedder = CLIPEmbedder("tiny", "cpu")
        embedder.close()
        embedder.close()
        with pytest.raises(Closed, match="was closed"):
            embedder.encode_text("a red circle")
        with pytest.raises(Closed, match="was closed"):
            asyncio.run(embedder.generate_embedding(picture_files[0]))
        with pytest.raises(Closed, match="was closed"):
            embed(embedder, picture_files)

    def test_closing_during_a_batch_ends_it_with_closed(self, picture_files: list[Path]) -> None:
        embedder = CLIPEmbedder("tiny", "cpu")
        busy, closed = threading.Event(), threading.Event()

        def hold(*_: Any) -> None:
            busy.set()
            assert closed.wait(PATIENCE)

        async def close_while_busy() -> None:
            Hooked(embedder, hold)
            batch = asyncio.create_task(embedder.generate_embeddings_batch(picture_files, 2, False))
            single = asyncio.create_task(asyncio.to_thread(busy.wait, PATIENCE))
            assert await single
            waiting = asyncio.create_task(embedder.generate_embedding(picture_files[0]))
            while embedder._model_thread._work_queue.empty():
                await asyncio.sleep(0.01)
            embedder.close()
            closed.set()
            with pytest.raises(Closed):
                await waiting
            with pytest.raises(Closed):
                await batch

        asyncio.run(close_while_busy())

    def test_a_cancelled_batch_stays_cancelled(self, embedder: CLIPEmbedder, picture_files: list[Path]) -> None:
        async def cancel() -> None:
            batch = asyncio.create_task(embedder.generate_embeddings_batch(picture_files, 1, False))
            await asyncio.sleep(0)
            batch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await batch

        asyncio.run(cancel())
        assert len(matrix(embed(embedder, picture_files))) == 12, "the embedder goes on"

    def test_garbage_collection_frees_the_model(self) -> None:
        embedder = CLIPEmbedder("tiny", "cpu")
        tower, decoders = weakref.ref(image_tower(embedder)), embedder._decoders
        del embedder
        gc.collect()
        assert tower() is None
        with pytest.raises(RuntimeError):
            decoders.submit(int)

    def test_the_last_reference_may_die_on_a_thread_of_the_embedder(self, picture_files: list[Path]) -> None:
        owner = [CLIPEmbedder("tiny", "cpu")]
        pool, tower = owner[0]._model_thread, weakref.ref(image_tower(owner[0]))
        pool.submit(owner.clear).result(PATIENCE)  # a deadlock or an error on that thread would show here
        gc.collect()
        assert tower() is None

    @pytest.mark.parametrize("before_exit", ["", "sys.exit(0)", "embedder.close()"])
    def test_the_interpreter_exits_with_a_live_embedder(self, picture_files: list[Path], before_exit: str) -> None:
        program = (
            "import asyncio, sys\n"
            "from app.models.clip_model import CLIPEmbedder\n"
            "embedder = CLIPEmbedder('tiny', 'cpu')\n"
            "vectors = asyncio.run(embedder.generate_embeddings_batch(sys.argv[1:], 4, False))\n"
            "print(len(vectors))\n"
            f"{before_exit}\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *map(str, picture_files)],
            cwd=TINY.parents[2], capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout == "12\n", done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


class TestOutOfMemory:
    """The fault is put into torch's module; what is asserted is how the embedder goes on."""

    @pytest.fixture
    def faulty(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CLIPEmbedder, list[int]]]:
        with CLIPEmbedder("tiny", "cpu", engine="torch") as embedder:
            tower, forward = image_tower(embedder).module, image_tower(embedder).module.forward
            largest = [3]

            def limited(pixels: torch.Tensor) -> torch.Tensor:
                if len(pixels) > largest[0]:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory (caused by a test)")
                return forward(pixels)

            monkeypatch.setattr(tower, "forward", limited)
            yield embedder, largest

    def test_the_batch_is_halved_with_warnings_until_it_fits(
        self,
        faulty: tuple[CLIPEmbedder, list[int]],
        embedder: CLIPEmbedder,
        picture_files: list[Path],
        log: list[tuple[str, str]],
    ) -> None:
        vectors = matrix(embed(faulty[0], picture_files, batch_size=12))
        warned = [message for level, message in log if level == "WARNING"]
        assert [message.split("batch size ")[1] for message in warned] == [
            "12; going on with 6",
            "6; going on with 3",
            "6; going on with 3",
        ]
        assert np.abs(vectors - matrix(embed(embedder, picture_files))).max() < 1e-5

    def test_one_image_that_does_not_fit_is_an_error(
        self, faulty: tuple[CLIPEmbedder, list[int]], picture_files: list[Path]
    ) -> None:
        faulty[1][0] = 0
        with pytest.raises(torch.cuda.OutOfMemoryError):
            embed(faulty[0], picture_files)
        faulty[1][0] = 12
        assert len(matrix(embed(faulty[0], picture_files))) == 12, "the embedder goes on"


class Watched(os.PathLike[str]):
    """A path that calls back on the thread that opens it."""

    def __init__(self, path: Path, on_open: Any) -> None:
        self.path, self.on_open = path, on_open

    def __fspath__(self) -> str:
        self.on_open()
        return str(self.path)


class TestConcurrency:
    def test_the_event_loop_ticks_during_every_decode_and_every_forward(self, picture_files: list[Path]) -> None:
        ticks, seen, stuck = [0], [], threading.Event()

        async def tick() -> None:
            while True:
                ticks[0] += 1
                await asyncio.sleep(0.001)

        def wait_for_a_tick(*_: Any) -> None:  # on the event loop's own thread this could never succeed
            before, polls = ticks[0], 0
            while ticks[0] == before and not stuck.is_set():
                threading.Event().wait(0.002)
                polls += 1
                if polls > 5000:
                    stuck.set()
            seen.append(ticks[0] > before)

        async def both(embedder: CLIPEmbedder) -> list[np.ndarray | None]:
            ticker = asyncio.create_task(tick())
            paths = [Watched(picture_files[number % 12], wait_for_a_tick) for number in range(200)]
            vectors = await embedder.generate_embeddings_batch(paths, batch_size=20, show_progress=False)
            single = await embedder.generate_embedding(paths[0])
            ticker.cancel()
            return [*vectors, single]

        with CLIPEmbedder("tiny", "cpu") as embedder:
            Hooked(embedder, wait_for_a_tick)
            vectors = asyncio.run(both(embedder))
        assert len(matrix(vectors)) == 201
        decodes, forwards = 201, 11
        assert all(seen) and len(seen) >= decodes + forwards

    def test_the_next_batch_decodes_while_the_model_works(self, picture_files: list[Path]) -> None:
        opened = threading.Event()
        overlapped = []

        def wait_for_the_next_batch(*_: Any) -> None:
            if not overlapped:  # the first batch's forward pass ends only once a file of the second is opened
                overlapped.append(opened.wait(PATIENCE / 2))

        paths = [*picture_files[:2], *(Watched(file, opened.set) for file in picture_files[2:4])]
        with CLIPEmbedder("tiny", "cpu") as embedder:
            Hooked(embedder, wait_for_the_next_batch)
            vectors = asyncio.run(embedder.generate_embeddings_batch(paths, batch_size=2, show_progress=False))
        assert overlapped == [True] and len(matrix(vectors)) == 4

    def test_batches_that_run_at_once_keep_their_own_vectors(
        self, embedder: CLIPEmbedder, picture_files: list[Path]
    ) -> None:
        async def many() -> list[list[np.ndarray | None]]:
            orders = [picture_files[start:] + picture_files[:start] for start in range(4)]
            return await asyncio.gather(*(embedder.generate_embeddings_batch(order, 5, False) for order in orders))

        expected = matrix(embed(embedder, picture_files))
        for start, vectors in enumerate(asyncio.run(many())):
            assert np.abs(matrix(vectors) - np.roll(expected, -start, axis=0)).max() < 1e-5


class TestCLIPModel:
    def test_it_works_and_warns(
        self, embedder: CLIPEmbedder, pictures: list[Image.Image], picture_files: list[Path]
    ) -> None:
        with pytest.warns(DeprecationWarning, match="CLIPModel is deprecated; use CLIPEmbedder"):
            model = CLIPModel(device="cpu", model_name="tiny")
        vector = model.encode_image(pictures[0])
        assert vector.shape == (512,)
        assert np.abs(vector - matrix(embed(embedder, picture_files[:1]))[0]).max() < 1e-5
        assert np.abs(model.encode_text("a red circle") - embedder.encode_text("a red circle")).max() < 1e-5

    def test_device_is_its_first_argument(self) -> None:
        parameters = inspect.signature(CLIPModel).parameters
        assert next(iter(parameters)) == "device" and parameters["device"].default == "auto"
        assert parameters["model_name"].default == "openai/clip-vit-base-patch32"
