"""What `make bench-flow` computes from what it saw, by hand; and its data is what the contract asks for."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import generated
from benchmarks.flow import innermost, own_seconds, slopes

SPANS = [
    {"step": "command", "begun": 0.0, "ended": 10.0},
    {"step": "generation", "begun": 2.0, "ended": 8.0},
    {"step": "index", "begun": 3.0, "ended": 4.0},
    {"step": "index", "begun": 5.0, "ended": 7.0},
]


def test_a_step_does_not_count_the_steps_inside() -> None:
    assert own_seconds(SPANS) == {"command": 4.0, "generation": 3.0, "index": 3.0}


@pytest.mark.parametrize(("moment", "step"), [(1.0, "command"), (2.5, "generation"), (6.0, "index"), (9.0, "command")])
def test_a_moment_belongs_to_the_innermost_step(moment: float, step: str) -> None:
    assert innermost(SPANS, moment) == step


def test_slopes_by_hand() -> None:
    sizes = {
        "100": {"cpu_seconds": 1.0, "steps": {"short": {"cpu_seconds": 0.1}, "long": {"cpu_seconds": 1.0}}},
        "1000": {"cpu_seconds": 10.0, "steps": {"short": {"cpu_seconds": 1.0}, "long": {"cpu_seconds": 100.0}}},
        "10000": {"cpu_seconds": 10.0, "steps": {"short": {"cpu_seconds": 10.0}, "new": {"cpu_seconds": 1.0}}},
    }
    assert slopes(sizes) == {"short": [None, 1.0], "long": [2.0], "the whole flow": [1.0, 0.0], "new": [None]}


def test_generated_data_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "CHUNK", 30)  # 100 users: three rounds and a remainder
    rows = generated.write_folder(tmp_path, 100, 250)
    events = pq.read_table(tmp_path / "interactions.parquet").to_pydict()
    items = pq.read_table(tmp_path / "items.parquet").to_pydict()
    assert len(events["user_id"]) == rows
    assert set(events["user_id"]) == {generated.user_id(n) for n in range(100)}
    assert min(events["user_id"].count(user) for user in set(events["user_id"])) == generated.FEWEST
    assert items["item_id"] == [generated.item_id(n) for n in range(250)]
    assert set(events["item_id"]) <= set(items["item_id"])
    assert sum(items["rare"]) == 5
