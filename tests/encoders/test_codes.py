"""Codes: the search over them is the paper's sum on the decoded vectors; fewer items than centroids lose nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.codes.history import Codebooks, Coded, attention, best, look_up, search
from encoders.codes.quantise import Product, Residual, train_product, train_residual
from encoders.codes.space import common_space

SUBSPACES, PART = 3, 2


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Codebooks, Coded, Coded]:
    """Codebooks, candidates and a history, some without some of their modalities."""
    modalities, centroids = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    candidates, events = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    books = Codebooks(
        random.standard_normal((modalities, SUBSPACES, centroids, PART)).astype(np.float32),
        random.uniform(0, 1, modalities).astype(np.float32),
    )

    def items(count: int) -> Coded:
        codes = random.integers(centroids, size=(count, modalities, SUBSPACES)).astype(np.uint8)
        return Coded(codes, random.random((count, modalities)) < 0.7)

    return books, items(candidates), items(events)


def paper(books: Codebooks, candidates: Coded, history: Coded) -> np.ndarray:
    """The sum over all pairs of modalities of shared-out weights and sub-space products, written out: [N, T]."""
    found = np.zeros((len(candidates), len(history)))
    own, theirs = books.shares(candidates.present), books.shares(history.present)
    for n in range(len(candidates)):
        for t in range(len(history)):
            for m in range(len(books.weights)):
                for other in range(len(books.weights)):
                    products = (
                        books.centroids[m, c, candidates.codes[n, m, c]]
                        @ books.centroids[other, c, history.codes[t, other, c]]
                        for c in range(SUBSPACES)
                    )
                    found[n, t] += own[n, m] * theirs[t, other] * sum(products)
    return found


@settings(max_examples=40)
@given(world=worlds(), k=st.integers(1, 50))
def test_both_searches_are_the_papers_sum_on_decoded_vectors(world: tuple[Codebooks, Coded, Coded], k: int) -> None:
    books, candidates, history = world
    exact = paper(books, candidates, history)
    places, scores = search(books, candidates, history, k)
    assert places.shape == (len(candidates), min(k, len(history)))
    np.testing.assert_allclose(scores, np.take_along_axis(exact, places, axis=1), atol=1e-4)
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, : min(k, len(history))], atol=1e-4)
    for n in range(len(candidates)):
        one = candidates.take(np.array([n]))
        np.testing.assert_allclose(look_up(books, one, history), exact[n], atol=1e-4)


@given(world=worlds())
def test_codes_of_an_absent_modality_say_nothing(world: tuple[Codebooks, Coded, Coded]) -> None:
    books, candidates, history = world
    others = np.where(history.present[..., None], history.codes, 0).astype(np.uint8)
    for found, again in zip(
        search(books, candidates, history, 7), search(books, candidates, Coded(others, history.present), 7), strict=True
    ):
        np.testing.assert_array_equal(found, again)


def test_the_best_of_equal_scores_are_the_first() -> None:
    places, scores = best(np.array([[1, 3, 2, 3, 1, 3]], np.float32), 4)
    assert places.tolist() == [[1, 3, 5, 2]]
    assert scores.tolist() == [[3, 3, 3, 2]]
    assert best(np.zeros((2, 0), np.float32), 3)[0].shape == (2, 0)


def test_the_best_few_begin_the_best_many() -> None:
    scores = np.random.default_rng(0).integers(9, size=(6, 50)).astype(np.float32)
    for k in range(1, 50):
        np.testing.assert_array_equal(best(scores, k)[0], best(scores, k + 1)[0][:, :k])


def test_attention_by_hand() -> None:
    np.testing.assert_allclose(attention(np.log([[1.0, 3.0]]) / 2, 0.5), [[0.25, 0.75]], rtol=1e-6)
    assert attention(np.zeros((3, 0), np.float32), 0.1).shape == (3, 0)


def _rows(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [1, 2, 100, 256])
def test_of_fewer_vectors_than_centroids_none_is_rounded(count: int) -> None:
    rows = _rows(count)
    product, residual = train_product(rows, 4), train_residual(rows, 4)
    assert product.centroids.shape == (4, count, 2)
    np.testing.assert_allclose(product.decode(product.encode(rows)), rows, atol=1e-6)
    assert residual.centroids.shape == (4, min(count, 16), 8)
    if count <= 16:
        np.testing.assert_allclose(residual.decode(residual.encode(rows)), rows, atol=1e-6)


def test_a_code_names_the_nearest_centroid_of_every_part() -> None:
    rows = _rows(1_000)
    product = train_product(rows, 4)
    assert product.centroids.shape == (4, 256, 2)
    codes = product.encode(rows)
    for place, part in enumerate(np.split(rows, 4, axis=1)):
        distances = ((part[:, None] - product.centroids[place]) ** 2).sum(axis=2)
        chosen = np.take_along_axis(distances, codes[:, place : place + 1].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-6)
    cosines = (product.decode(codes) * rows).sum(axis=1) / np.linalg.norm(product.decode(codes), axis=1)
    assert cosines.mean() > 0.98


def test_every_level_leaves_less_over() -> None:
    rows = _rows(2_000)
    residual = train_residual(rows, 4)
    codes = residual.encode(rows)
    left = [
        np.linalg.norm(rows - Residual(residual.centroids[:depth]).decode(codes[:, :depth]), axis=1).mean()
        for depth in (1, 2, 3, 4)
    ]
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0] * 0.7
    # The first levels of the codes are the codes of the first levels.
    np.testing.assert_array_equal(Residual(residual.centroids[:2]).encode(rows), codes[:, :2])


def test_training_repeats() -> None:
    rows = _rows(1_500)
    np.testing.assert_array_equal(train_product(rows, 4).centroids, train_product(rows, 4).centroids)
    np.testing.assert_array_equal(train_residual(rows, 2).centroids, train_residual(rows, 2).centroids)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="needs vectors"):
        train_product(np.zeros((0, 8), np.float32), 4)
    with pytest.raises(ValueError, match="8 numbers cannot be cut into 3"):
        train_product(_rows(5), 3)
    assert Product(_rows(6, 4).reshape(2, 3, 4)).encode(np.zeros((0, 8), np.float32)).shape == (0, 2)


def test_a_text_and_a_picture_of_one_item_meet_in_the_common_space() -> None:
    """Two views, of different widths, of the same eight numbers: known by the same item, not by another one."""
    random = np.random.default_rng(1)
    latent = random.standard_normal((600, 8))
    views = {"text": random.standard_normal((8, 20)), "image": random.standard_normal((8, 12))}
    content = {
        name: (latent @ view + 0.1 * random.standard_normal((600, view.shape[1]))).astype(np.float32)
        for name, view in views.items()
    }
    present = {"text": np.ones(600, bool), "image": random.random(600) < 0.6}
    space = common_space(content, present, 16)
    text, image = (space[name](content[name]) for name in ("text", "image"))
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert (text * image).sum(axis=1).mean() > 0.6
    assert abs((text * np.roll(image, 1, axis=0)).sum(axis=1).mean()) < 0.1
    # Rows that are not there teach nothing.
    content["image"][~present["image"]] = 1e6
    np.testing.assert_allclose(common_space(content, present, 16)["text"](content["text"]), text, atol=1e-4)


def test_one_modality_and_hardly_any_items_have_a_space() -> None:
    rows = _rows(3, 5)
    space = common_space({"text": rows}, {"text": np.ones(3, bool)})
    placed = space["text"](rows)
    assert placed.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(placed, axis=1), 1, atol=1e-5)
    nothing = common_space({"text": rows[:1]}, {"text": np.ones(1, bool)})["text"](rows[:1])
    assert not nothing.any()
