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
    """Base of everything on the wire. Unknown fields are passed over, as OpenAI's clients expect."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class TextItem(Wire):
    """A text among mixed inputs."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr


class ImageItem(Wire):
    """An image among mixed inputs: a data URI, bare base64, or an http(s) address where those are switched on."""

    model_config = ConfigDict(extra="forbid")
    image: StrictStr


ITEM_TYPES = (TextItem, ImageItem)  # those with fields
Item = StrictStr | TextItem | ImageItem
# A long list of wrong items would make a problem for each of them: 2 GB and 5 s for a body of 1 MB.
Items = Annotated[list[Item], Field(fail_fast=True)]


class Options(Wire):
    """What every embedding route accepts."""

    model: Annotated[StrictStr | None, Field(description="Optional; must be the served model's id.")] = None
    encoding_format: EncodingFormat = "float"
    dtype: Annotated[DType, Field(description="Of base64 and .npy answers; little-endian.")] = "float32"
    on_error: Annotated[
        OnError, Field(description="fail: the first bad item decides the answer. partial: one entry an item.")
    ] = "fail"


class EmbeddingsRequest(Options):
    """`POST /v1/embeddings`: OpenAI's shape, with images."""

    input: Item | Items
    modality: Annotated[Modality, Field(description="What plain strings are.")] = "text"
    dimensions: Annotated[StrictInt | None, Field(description="Must equal the checkpoint's dimension.")] = None


class RankRequest(Wire):
    """`POST /v1/rank`: a query and candidates, each a text (a plain string too) or an image."""

    model: StrictStr | None = None
    query: Item
    candidates: Items


class WeightedItem(Wire):
    """One of several things to search for at once: one of `text`, `image` and `id`."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr | None = None
    image: StrictStr | None = None
    id: Annotated[StrictStr | None, Field(description="A row that is in the collection: more like this.")] = None
    weight: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False, description="Below 0: unlike this.")] = 1.0

    @model_validator(mode="after")
    def _one(self) -> WeightedItem:
        if sum(value is not None for value in (self.text, self.image, self.id)) != 1:
            raise ValueError("must have one of text, image and id")
        return self


class SearchRequest(Wire):
    """`POST /v1/search`: a text, or a list of texts, images and ids of rows, each with a weight."""

    model: StrictStr | None = None
    query: StrictStr | WeightedItem | Annotated[list[WeightedItem], Field(min_length=1, max_length=16, fail_fast=True)]
    limit: Annotated[StrictInt, Field(ge=1, le=1000)] = 10
    offset: Annotated[StrictInt, Field(ge=0, le=100_000)] = 0
    filter: Annotated[dict[str, Any] | None, Field(description="Of the payload, as Qdrant writes filters.")] = None
    thumbnails: Annotated[bool, Field(description="Whether payloads come with their thumbnails.")] = False


class SearchResult(Wire):
    """One row, best first."""

    id: str
    score: Annotated[float, Field(description="Cosine to the query, -1..1.")]
    payload: dict[str, Any]


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
    """One item's vector: floats, or base64 over little-endian bytes; null with `error` in partial mode."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str | None
    truncated: Annotated[bool | None, Field(description="true where a text was longer than the context.")] = None
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
    score: Annotated[float, Field(description="Cosine, -1..1.")]
    probability: float


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
    dimension: int
    context_length: int
    image_size: int
    fingerprint: str
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
    search: Annotated[bool, Field(description="Whether /v1/search has a collection.")]
    items_per_second: ByTower
    in_flight: ByTower
    batch: ByTower
    replicas: dict[str, int]


class Health(Wire):
    """What `/healthz` and `/readyz` answer."""

    status: str
    deployments: dict[str, str]


class ErrorDetail(Wire):
    """OpenAI's error body."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorResponse(Wire):
    """Every answer of 400 and above."""

    error: ErrorDetail
