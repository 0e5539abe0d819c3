"""Similarity, ranking and the wire forms of vectors."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays

from clipfleet.vectors import DType, cosine, from_base64, rank, to_base64, to_npy

numbers = some.floats(-1e3, 1e3, width=32)
vectors = arrays(np.float32, 8, elements=numbers)


@given(vectors, vectors)
def test_cosine_is_symmetric_and_within_one(first: np.ndarray, second: np.ndarray) -> None:
    value = cosine(first, second)
    assert type(value) is float and -1 <= value <= 1 and value == cosine(second, first)


def test_cosine_is_the_angles() -> None:
    assert cosine(np.array([3.0, 0]), np.array([5.0, 0])) == 1
    assert cosine(np.array([1.0, 0]), np.array([0, 2.0])) == 0
    assert cosine(np.array([1.0, 0]), np.array([-1.0, 0])) == -1
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1.0])) == pytest.approx(0.5**0.5)


def test_a_zero_vector_is_like_nothing() -> None:
    assert cosine(np.zeros(3), np.ones(3)) == 0


@pytest.mark.parametrize(("first", "second"), [((3,), (4,)), ((1, 3), (1, 3)), ((), ())])
def test_cosine_refuses_shapes_by_name(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two vectors of one shape"):
        cosine(np.ones(first), np.ones(second))


def test_rank_is_best_first_with_probabilities_of_the_scale() -> None:
    candidates = np.array([[0.0, 1], [1, 0], [0.6, 0.8]])
    ranked = rank(np.array([2.0, 0]), candidates, logit_scale=10)
    assert [item.index for item in ranked] == [1, 2, 0]
    assert [item.score for item in ranked] == pytest.approx([1, 0.6, 0])
    powers = np.exp([10, 6, 0])
    assert [item.probability for item in ranked] == pytest.approx(powers / powers.sum())


def test_rank_with_a_bias_judges_each_alone() -> None:
    ranked = rank(np.array([1.0, 0]), np.array([[1.0, 0], [0, 1]]), logit_scale=10, logit_bias=-5)
    assert [item.probability for item in ranked] == pytest.approx([1 / (1 + np.exp(-5)), 1 / (1 + np.exp(5))])


def test_a_bias_of_zero_is_a_bias() -> None:
    ranked = rank(np.array([1.0, 0]), np.array([[0, 1.0], [0, 1]]), logit_bias=0.0)
    assert [item.probability for item in ranked] == [0.5, 0.5]


def test_equal_scores_keep_their_order() -> None:
    assert [item.index for item in rank(np.ones(2), np.ones((5, 2)))] == [0, 1, 2, 3, 4]


def test_nothing_to_rank_is_an_empty_ranking() -> None:
    assert rank(np.ones(3), np.zeros((0, 3))) == []


def test_extreme_scales_overflow_nothing() -> None:
    candidates = np.array([[1.0, 0], [-1, 0]])
    assert [item.probability for item in rank(np.array([1.0, 0]), candidates, logit_scale=1e6)] == [1, 0]
    sigmoid = rank(np.array([1.0, 0]), candidates, logit_scale=1e6, logit_bias=0.0)
    assert [item.probability for item in sigmoid] == [1, 0]


@pytest.mark.parametrize(("query", "candidates"), [((3,), (2, 4)), ((1, 3), (2, 3)), ((3,), (3,))])
def test_rank_refuses_shapes_by_name(query: tuple[int, ...], candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"query \(d,\) and candidates \(n, d\)"):
        rank(np.ones(query), np.ones(candidates))


@given(vectors)
def test_base64_comes_back_exactly(vector: np.ndarray) -> None:
    assert np.array_equal(from_base64(to_base64(vector)), vector)
    half = from_base64(to_base64(vector, "float16"), "float16")
    assert half.dtype == np.float16 and np.array_equal(half, vector.astype(np.float16))


def test_base64_is_little_endian_whatever_the_array() -> None:
    assert base64.b64decode(to_base64(np.array([1.0, -2.0], ">f4"))) == b"\0\0\x80?\0\0\0\xc0"
    assert base64.b64decode(to_base64(np.array([1.0]), "float16")) == b"\0<"
    assert from_base64("AACAPw==").tolist() == [1.0]


def test_base64_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="base64"):
        from_base64("not base64!")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_npy_reads_back(dtype: DType, rows: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    read = np.load(io.BytesIO(to_npy(matrix, dtype)), allow_pickle=False)
    assert read.dtype == np.dtype(dtype) and np.array_equal(read, matrix.astype(dtype))
