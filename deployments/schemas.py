"""What requests and answers look like: the types that validate are the ones that /openapi.json shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from clipfleet.vectors import DType

EncodingFormat = Literal["float", "base64"]
OnError = Literal["fail", "partial"]
Modality = Literal["text", "image"]


class Wire(BaseModel):
    """Base of everything on the wire. Unknown fields are passed over, as OpenAI's clients expect.

    What stands below a field is its description.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), use_attribute_docstrings=True)


class TextItem(Wire):
    """A text among mixed inputs."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr


class ImageItem(Wire):
    """An image among mixed inputs."""

    model_config = ConfigDict(extra="forbid")
    image: StrictStr
    """A data URI, bare base64, or an http(s) address where those are switched on."""


ITEM_TYPES = (TextItem, ImageItem)  # those with fields
Item = StrictStr | TextItem | ImageItem
# A long list of wrong items would make a problem for each of them: 2 GB and 5 s for a body of 1 MB.
Items = Annotated[list[Item], Field(fail_fast=True)]


class Options(Wire):
    """What every embedding route accepts."""

    model: StrictStr | None = None
    """If given, the served model's id."""
    encoding_format: EncodingFormat = "float"
    """`base64` is of the vector's little-endian bytes."""
    dtype: DType = "float32"
    """Of base64 and .npy; JSON floats refuse `float16`."""
    on_error: OnError = "fail"
    """`fail`: the first bad item decides the answer. `partial`: it is 200, with one entry an item."""


class EmbeddingsRequest(Options):
    """`POST /v1/embeddings`: OpenAI's shape, with images."""

    input: Item | Items
    """One item or many, in order."""
    modality: Modality = "text"
    """What plain strings are."""
    dimensions: StrictInt | None = None
    """If given, the checkpoint's dimension."""


class RankRequest(Wire):
    """`POST /v1/rank`: a query and candidates. A plain string is a text."""

    model: StrictStr | None = None
    """If given, the served model's id."""
    query: Item
    """What the candidates are compared with."""
    candidates: Items
    """What is ranked."""


class WeightedItem(Wire):
    """One of several things to search for at once: one of `text`, `image` and `id`."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr | None = None
    image: StrictStr | None = None
    """A data URI, bare base64, or an http(s) address where those are switched on."""
    id: StrictStr | None = None
    """A row that is in the collection: more like this."""
    weight: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0
    """Below 0: unlike this."""

    @model_validator(mode="after")
    def _one(self) -> WeightedItem:
        if sum(value is not None for value in (self.text, self.image, self.id)) != 1:
            raise ValueError("must have one of text, image and id")
        return self


class SearchRequest(Wire):
    """`POST /v1/search`. Other fields are refused: one that is misspelt would give other rows without a word."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    """If given, the served model's id."""
    query: StrictStr | WeightedItem | Annotated[list[WeightedItem], Field(min_length=1, max_length=16, fail_fast=True)]
    """A text, or what else to search for, one thing or several. Their vectors are added by their weights."""
    limit: Annotated[StrictInt, Field(ge=1, le=1000)] = 10
    """How many rows."""
    offset: Annotated[StrictInt, Field(ge=0, le=100_000)] = 0
    """From which row on."""
    filter: dict[str, Any] | None = None
    """Of the payload, as [Qdrant writes filters](https://qdrant.tech/documentation/concepts/filtering/)."""
    thumbnails: bool = False
    """Whether payloads come with their thumbnails."""


class SearchResult(Wire):
    """One row, best first."""

    id: str
    score: float
    """Cosine to the query, -1..1."""
    payload: dict[str, Any]
    """What the collection keeps of it."""


class SearchResponse(Wire):
    """What `/v1/search` answers."""

    object: Literal["list"] = "list"
    model: str
    fingerprint: str
    results: list[SearchResult]


class ItemError(Wire):
    """Why an item has no vector."""

    code: str
    message: str


class Embedding(Wire):
    """One item's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    """Of the item in the request, from 0."""
    embedding: list[float] | str | None
    """Floats, or base64 of their bytes; null where there is an error, in partial mode."""
    truncated: bool | None = None
    """true where a text was longer than the context, and cut."""
    error: ItemError | None = None


class Usage(Wire):
    """Tokens that the text tower saw."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(Wire):
    """What both embedding routes answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    fingerprint: str
    usage: Usage


class RankResult(Wire):
    """One candidate, best first."""

    index: int
    """Of the candidate in the request, from 0."""
    score: float
    """Cosine to the query, -1..1."""
    probability: float
    """By the model's own scale: for CLIP a softmax over the candidates, for SigLIP a sigmoid, each candidate on its own."""


class RankResponse(Wire):
    """What `/v1/rank` answers."""

    object: Literal["list"] = "list"
    model: str
    fingerprint: str
    results: list[RankResult]


class Model(Wire):
    """A served checkpoint."""

    id: str
    object: Literal["model"] = "model"
    revision: str | None
    """The hub's commit; null where the checkpoint is not from there."""
    dimension: int
    """Of its vectors."""
    context_length: int
    """Tokens of a text; what is longer is cut."""
    image_size: int
    """Pixels of a side, to which pictures are resized."""
    fingerprint: str
    """What makes vectors comparable."""
    precision: str
    engine: str


def public_model(description: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Model, of what an encoder says of its checkpoint."""
    return {"object": "model", **{name: description[name] for name in Model.model_fields if name != "object"}}


class ModelList(Wire):
    """What `/v1/models` answers."""

    object: Literal["list"] = "list"
    data: list[Model]


class ByTower(Wire):
    """A figure of each tower; null where there is none yet."""

    image: float | None
    text: float | None


class Stats(Wire):
    """What `/v1/stats` answers: the figures of the ingress replica that was asked, and all replicas."""

    model: Model
    search: bool
    """Whether `/v1/search` has a collection."""
    items_per_second: ByTower
    """Computed, over the last 10 s."""
    in_flight: ByTower
    """Items that the replica holds."""
    batch: ByTower
    """Mean sizes of the encoders' last batches."""
    replicas: dict[str, int]
    """Running ones, by deployment."""


class Health(Wire):
    """What `/healthz` and `/readyz` answer."""

    status: str
    """`alive`, `ready` or `not ready`."""
    deployments: dict[str, str]
    """Of each one `ready`, `starting`, or how long it has had no success."""


class ErrorDetail(Wire):
    """What went wrong."""

    message: str
    type: str
    """OpenAI's name for the status."""
    code: str
    param: str | None
    """The field, or the item such as `input[3]`, that is wrong."""


class ErrorResponse(Wire):
    """OpenAI's error body."""

    error: ErrorDetail
