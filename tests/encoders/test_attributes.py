"""Feature hashing of attributes: unit, deterministic across processes, near for what is near."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.content.attributes import AttributesEncoder
from polytower.errors import UserError

ENCODER = AttributesEncoder()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
attributes = st.dictionaries(
    st.text(max_size=6), st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=6), max_size=6
)


def _vector(value: dict[str, Any]) -> np.ndarray:
    return next(ENCODER.encode([value]))[0]


def _cosine(a: dict[str, Any], b: dict[str, Any]) -> float:
    return float(_vector(a) @ _vector(b))


@given(drawn=st.lists(attributes, min_size=1, max_size=5), batch_size=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_any_attributes_give_a_unit_vector_in_any_batch(drawn: list[dict[str, Any]], batch_size: int) -> None:
    rows = np.concatenate(list(ENCODER.encode(drawn, batch_size)))
    assert rows.shape == (len(drawn), 256)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rows, np.stack([_vector(each) for each in drawn]))


@given(drawn=attributes)
@settings(max_examples=30, deadline=None)
def test_the_order_of_attributes_does_not_matter(drawn: dict[str, Any]) -> None:
    np.testing.assert_allclose(_vector(drawn), _vector(dict(reversed(drawn.items()))), atol=1e-6)


def test_another_process_gives_the_same_vector() -> None:
    value = {"year": 1995, "genres": ["Comedy", "鞋"], "sold": True, "size": {"width": 1.5}}
    code = (
        "import json, sys; from encoders.content.attributes import AttributesEncoder;"
        "print(json.dumps(next(AttributesEncoder().encode([json.loads(sys.argv[1])]))[0].tolist()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(value)],
        capture_output=True,
        check=True,
        text=True,
        env={"PYTHONHASHSEED": "7"},
    )
    np.testing.assert_array_equal(np.array(json.loads(out.stdout), np.float32), _vector(value))


def test_near_numbers_are_near() -> None:
    near, mid, far = (_cosine({"year": 1995}, {"year": year}) for year in (1996, 2003, 1920))
    assert near > mid > far
    assert near > 0.95
    assert far < 0.8
    assert abs(_cosine({"price": 9.99}, {"price": -9.99})) < 0.3
    assert _cosine({"price": 999}, {"price": 1001}) > 0.5


def test_a_name_belongs_to_its_value() -> None:
    assert abs(_cosine({"actor": "Clint"}, {"director": "Clint"})) < 0.3


def test_a_string_ignores_case_and_blanks() -> None:
    assert _cosine({"brand": " ACME\u00a0"}, {"brand": "acme"}) == pytest.approx(1)


def test_a_long_list_weighs_as_much_as_a_scalar() -> None:
    crowd = [f"actor {number}" for number in range(60)]
    same_genre = _cosine({"genre": "noir", "actors": crowd}, {"genre": "noir", "actors": ["x"]})
    assert 0.3 < same_genre < 0.7
    shared = _cosine({"genres": ["a", "b"]}, {"genres": ["b", "c"]})
    assert 0.3 < shared < 0.7


def test_tokens_that_meet_in_one_place_do_not_cancel() -> None:
    pairs = [{"a": f"x{number}", "b": f"y{number}"} for number in range(5000)]
    rows = np.concatenate(list(ENCODER.encode(pairs)))
    # Two tokens, four places each: with one place each, some of 5,000 pairs would have cancelled to nothing.
    assert (np.count_nonzero(rows, axis=1) >= 4).all()


def test_blank_values_are_described_by_their_names() -> None:
    assert _cosine({"color": None, "sizes": []}, {"color": " ", "sizes": [None]}) == pytest.approx(1)


def test_the_revision_names_the_scheme_and_the_dimension() -> None:
    assert AttributesEncoder().revision == ENCODER.revision
    assert AttributesEncoder(128).revision != ENCODER.revision
    assert next(AttributesEncoder(128).encode([{"a": 1}])).shape == (1, 128)
    with pytest.raises(UserError, match="multiple of 4"):
        AttributesEncoder(254)


def test_chunks() -> None:
    encoded = list(ENCODER.encode_chunks(iter([[{"a": 1}, {"b": 2}], [], [{"c": 3}]])))
    assert [each.embeddings.shape for each in encoded] == [(2, 256), (0, 256), (1, 256)]
