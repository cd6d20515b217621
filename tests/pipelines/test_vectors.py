"""Each gate fails on vectors that have its fault and passes on sound ones; laws hold on drawn shapes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.generation.embedding_gates import (
    VECTOR_GATES,
    Floats,
    Gate,
    Limits,
    dead_dimensions,
    duplicates,
    effective_rank,
    interest_collapse,
    mean_cosine,
    vector_gates,
)

D = 16


def sound(n: int = 200, d: int = D, seed: int = 0) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def not_a_number(rows: Floats) -> Floats:
    rows[3, 5] = np.nan
    return rows


def too_long(rows: Floats) -> Floats:
    rows[7] *= 1.1
    return rows


def one_direction(rows: Floats) -> Floats:
    rows[:, 0] += 20
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def on_a_line(rows: Floats) -> Floats:
    return rows[:1] * np.where(np.arange(len(rows)) % 2, 1, -1)[:, None].astype(np.float32)


def half_dead(rows: Floats) -> Floats:
    rows[:, : D // 2 + 1] = 0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def repeated(rows: Floats) -> Floats:
    rows[50:] = rows[:1]
    return rows


FAULTS = {
    "finite": not_a_number,
    "norm_error": too_long,
    "mean_cosine": one_direction,
    "effective_rank": on_a_line,
    "dead_dimensions": half_dead,
    "duplicates": repeated,
}


def gates(rows: Floats) -> dict[str, Gate]:
    return {gate.name.removeprefix("x_"): gate for gate in vector_gates("x", rows)}


def test_sound_vectors_pass_every_gate() -> None:
    found = gates(sound())
    assert tuple(found) == VECTOR_GATES
    assert all(gate.passed and gate.value is not None for gate in found.values()), found


@pytest.mark.parametrize("name", VECTOR_GATES)
def test_each_gate_fails_on_its_fault(name: str) -> None:
    gate = gates(FAULTS[name](sound()))[name]
    assert not gate.passed, gate


@pytest.mark.parametrize("name", sorted(set(VECTOR_GATES) - {"mean_cosine", "effective_rank", "duplicates"}))
def test_local_faults_leave_the_shape_gates_alone(name: str) -> None:
    found = gates(FAULTS[name](sound()))
    assert found["mean_cosine"].passed
    assert found["effective_rank"].passed


def test_few_vectors_have_no_shape() -> None:
    found = gates(sound(3))
    assert [name for name, gate in found.items() if gate.value is None] == list(VECTOR_GATES[2:])
    assert all(gate.passed for gate in found.values())
    assert all(gate.passed for gate in gates(np.zeros((0, 1), np.float32)).values())


def test_limits_move_the_thresholds() -> None:
    rows = repeated(sound())
    assert all(gate.passed for gate in vector_gates("x", rows, Limits(duplicates=1, mean_cosine=1, effective_rank=0)))


def test_gate_at_its_threshold_passes_and_nan_fails() -> None:
    assert Gate("g", 0.5, 0.5, "at least").passed
    assert Gate("g", 0.5, 0.5, "at most").passed
    assert not Gate("g", 0.4, 0.5, "at least").passed
    broken = Gate("g", float("nan"), 0.5, "at most")
    assert not broken.passed
    assert json.loads(json.dumps(broken.as_json(), allow_nan=False))["value"] == "nan"
    assert str(Gate("g", None, 0.5, "at most")) == "g is not measured (needs at most 0.5)"


def test_hand_solved_statistics() -> None:
    corners = np.eye(4, dtype=np.float32)
    assert mean_cosine(corners) == pytest.approx(0)
    assert effective_rank(corners) == pytest.approx(3)  # centred, four corners span three equal directions
    assert effective_rank(np.ones((40, 4), np.float32)) == 1
    assert dead_dimensions(np.array([[1, 0], [1, 1]], np.float32)) == 0.5
    assert duplicates(np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)) == 0.5


def test_interest_collapse_is_the_mean_of_the_closest_pairs() -> None:
    apart, equal = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 0]], np.float32)
    assert interest_collapse([apart, equal]) == pytest.approx(0.5)
    assert interest_collapse([equal[:1], apart[:1]]) is None


drawn = st.builds(sound, n=st.integers(32, 80), d=st.integers(2, 24), seed=st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=40)
@given(rows=drawn, seed=st.integers(0, 2**32 - 1))
def test_statistics_do_not_depend_on_order_or_rotation(rows: Floats, seed: int) -> None:
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((rows.shape[1], rows.shape[1])))[0].astype(np.float32)
    moved = random.permutation(rows) @ turn
    assert mean_cosine(moved) == pytest.approx(mean_cosine(rows), abs=1e-4)
    assert effective_rank(moved) == pytest.approx(effective_rank(rows), rel=1e-3)
    assert duplicates(random.permutation(rows)) == duplicates(rows)


@settings(deadline=None, max_examples=40)
@given(rows=drawn, copies=st.integers(1, 3))
def test_bounds_and_repetition(rows: Floats, copies: int) -> None:
    repeated_rows = np.tile(rows, (copies, 1))
    assert 1 <= effective_rank(repeated_rows) <= min(len(rows) - 1, rows.shape[1]) + 1e-6
    assert effective_rank(repeated_rows) == pytest.approx(effective_rank(rows), rel=1e-6)
    assert duplicates(repeated_rows) == pytest.approx(1 - 1 / copies)
    assert -1 / (len(rows) - 1) - 1e-6 <= mean_cosine(rows) <= 1
    same = [np.repeat(row[None], 3, axis=0) for row in rows]
    assert interest_collapse(same) == pytest.approx(1, abs=1e-5)
