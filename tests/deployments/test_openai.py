"""OpenAI's own client, and the embedding classes of LangChain and LlamaIndex that are built on it, as they are."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import openai
import pytest

from tests.deployments.service import Service
from tests.library import Library

TEXTS = ["a red circle", "a blue star", "a green ring"]


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def rows(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32)


def test_texts(client: openai.OpenAI, library: Library) -> None:
    """By default it asks for base64 and decodes that itself."""
    expected = library.texts(TEXTS)
    answer = client.embeddings.create(input=TEXTS, model="tiny")
    assert np.abs(rows(answer) - expected).max() <= 1e-5
    assert answer.model == "tiny" and answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert (
        np.abs(rows(client.embeddings.create(input=TEXTS, model="tiny", encoding_format="float")) - expected).max()
        <= 1e-5
    )
    assert (
        np.abs(rows(client.embeddings.create(input=TEXTS[0], model="tiny", dimensions=512)) - expected[:1]).max()
        <= 1e-5
    )


def test_images_through_extra_body(client: openai.OpenAI, library: Library, files: list[bytes]) -> None:
    sent = [base64.b64encode(file).decode() for file in files[:2]]
    answer = client.embeddings.create(input=sent, model="tiny", extra_body={"modality": "image"})
    assert np.abs(rows(answer) - library.images(files[:2])).max() <= 1e-5
    mixed = {"input": [{"image": f"data:image/png;base64,{sent[0]}"}, "a red circle"]}
    answer = client.embeddings.create(input="", model="tiny", extra_body=mixed)
    assert np.abs(rows(answer)[0] - library.images(files[:1])[0]).max() <= 1e-5
    assert np.abs(rows(answer)[1] - library.texts(["a red circle"])[0]).max() <= 1e-5


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


@pytest.mark.parametrize(
    ("ask", "error", "code", "param"),
    [
        (lambda c: c.embeddings.create(input="a", model="ada"), openai.NotFoundError, "model_not_found", "model"),
        (lambda c: c.embeddings.create(input=[], model="tiny"), openai.BadRequestError, "empty_input", "input"),
        (
            lambda c: c.embeddings.create(input="a", model="tiny", dimensions=3),
            openai.BadRequestError,
            "unsupported_dimensions",
            "dimensions",
        ),
        (
            lambda c: c.embeddings.create(input=[[1, 2]], model="tiny"),
            openai.BadRequestError,
            "invalid_request",
            "input[0]",
        ),
        (
            lambda c: c.embeddings.create(input=[1, 2], model="tiny"),
            openai.BadRequestError,
            "invalid_request",
            "input[0]",
        ),
        (
            lambda c: c.embeddings.create(input=["aGVsbG8="], model="tiny", extra_body={"modality": "image"}),
            openai.APIStatusError,
            "image_format_unsupported",
            "input[0]",
        ),
        (
            lambda c: c.embeddings.create(
                input=[base64.b64encode(b"\x89PNG\r\n\x1a\n cut").decode()],
                model="tiny",
                extra_body={"modality": "image"},
            ),
            openai.UnprocessableEntityError,
            "image_corrupt",
            "input[0]",
        ),
        (
            lambda c: c.embeddings.create(input=["a"] * 3000, model="tiny"),
            openai.APIStatusError,
            "too_many_items",
            "input",
        ),
    ],
)
def test_errors_are_its_own_exceptions(
    client: openai.OpenAI,
    ask: Callable[[openai.OpenAI], object],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        ask(client)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_token_ids_are_answered_with_the_way_out(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(input=[[1, 2]], model="tiny")


LANGCHAIN = """
import sys
from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings(
    base_url=sys.argv[1], api_key="any", model="tiny", check_embedding_ctx_length=False
)
found = [*embeddings.embed_documents(sys.argv[2:]), embeddings.embed_query(sys.argv[2])]
"""
LLAMA_INDEX = """
import sys
from llama_index.embeddings.openai import OpenAIEmbedding

embeddings = OpenAIEmbedding(model_name="tiny", api_base=sys.argv[1], api_key="any")
found = [*embeddings.get_text_embedding_batch(sys.argv[2:]), embeddings.get_query_embedding(sys.argv[2])]
"""


@pytest.mark.parametrize("script", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama-index"])
def test_what_is_built_on_it(service: Service, library: Library, script: str) -> None:
    """In a process of its own: what these packages import warns."""
    command = [sys.executable, "-c", f"{script}\nimport json; print(json.dumps(found))", f"{service.url}/v1", *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    assert np.abs(found - library.texts([*TEXTS, TEXTS[0]])).max() <= 1e-5
