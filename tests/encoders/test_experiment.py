"""Experiments from contract folders, and the reader under them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from encoders.comparison import differences
from encoders.config import changed
from encoders.experiment import CONTROLS, SPLITS, read_folder, run_experiment
from encoders.folder import read_interactions, read_items
from encoders.presets import PRESETS, preset
from polytower.errors import UserError
from tests.factories import tiny_folder

OPTIONS = {"epochs": 2, "threads": 1}


def test_an_experiment_reports_mean_and_spread_beside_the_baselines(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data")
    report = run_experiment(
        folder, "tiny", [0, 1], directory=tmp_path / "runs", modalities=["attributes"], options=OPTIONS, device="cpu"
    )
    assert json.loads(json.dumps(report)) == report
    assert {"data", "preset", "seeds", "parameters", "seconds_per_epoch", "epochs"} <= set(report)
    assert set(report["metrics"]["masked"]["ndcg@10"]) == {"mean", "std"}
    assert set(report["baselines"]) == {"popularity", "item_knn", "tf_idf", "knn_tf_idf"}
    assert report["seeds"] == [0, 1]
    assert report["epochs"] == [2, 2]


def test_controls_and_other_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data")
    one = run_experiment(
        folder, "tiny", [0], directory=tmp_path / "one", modalities=["attributes"], options=OPTIONS, device="cpu",
        controls=list(CONTROLS),
    )  # fmt: skip
    assert set(one["controls"]) == {"equal_width", "permuted"}
    assert set(one["differences"]) == {*one["baselines"], *one["controls"]}
    for name, other in one["controls"].items():
        apart = one["differences"][name]["recall@10"]
        expected = one["metrics"]["masked"]["recall@10"]["mean"] - other["recall@10"]["mean"]
        assert apart["mean"] == pytest.approx(expected)
    assert sum(part["targets"] for part in one["segments"]["target_events"].values()) == one["questions"]
    again = run_experiment(
        folder, "tiny", [0], directory=tmp_path / "two", modalities=["attributes"], options=OPTIONS, device="cpu",
        against=tmp_path / "one",
    )  # fmt: skip
    same = again["differences"][str(tmp_path / "one")]
    assert same["ndcg@10"] == {"mean": 0, "error": 0}
    with pytest.raises(UserError, match="name the folder"):
        run_experiment(folder, "tiny", [0], directory=tmp_path / "three", options=OPTIONS, against=tmp_path)
    with pytest.raises(UserError, match="answers other questions"):
        run_experiment(
            folder, "tiny", [0], directory=tmp_path / "four", options=OPTIONS, against=tmp_path / "one",
            split="strong_generalisation",
        )  # fmt: skip
    with pytest.raises(UserError, match="no control 'nosuch'; there are"):
        run_experiment(folder, "tiny", [0], directory=tmp_path / "five", options=OPTIONS, controls=["nosuch"])
    with pytest.raises(UserError, match="name it with --content"):
        run_experiment(folder, "tiny", [0], directory=tmp_path / "five", options=OPTIONS, controls=["permuted"])


def test_differences_by_hand() -> None:
    ours, theirs = torch.tensor([[1, 60, 20], [1, 20, 20]]), torch.tensor([[20, 20, 20]])
    found = differences(ours, theirs)
    assert found["recall@10"]["mean"] == pytest.approx(1 / 3)
    assert found["recall@10"]["error"] == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5)
    assert found["recall@50"]["mean"] == pytest.approx(-0.5 / 3)
    assert found["ndcg@10"]["mean"] == pytest.approx(1 / 3)


def test_content_is_encoded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tiny_folder(tmp_path / "data"), tmp_path / "cache"
    _, first, _ = read_folder(folder, ["attributes"], cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("encoders.attributes.AttributesEncoder.encode_chunks", None)
        _, second, _ = read_folder(folder, ["attributes"], cache=cache)
    np.testing.assert_array_equal(first.content["attributes"], second.content["attributes"])
    np.testing.assert_array_equal(first.present["attributes"], second.present["attributes"])
    _, other, _ = read_folder(tiny_folder(tmp_path / "data", items=20), ["attributes"], cache=cache)
    assert len(other.content["attributes"]) == 20


def test_pictures_are_read_from_their_folder_and_bad_ones_count_as_none(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data", items=6, images=True)
    (folder / "images" / "i1.jpg").write_bytes(b"no picture")
    (folder / "images" / "i2.jpg").unlink()
    _, catalogue, _ = read_folder(folder, ["image"], images=folder / "images", device="cpu")
    assert catalogue.present["image"].tolist() == [True, False, False, True, False, True]
    assert (np.linalg.norm(catalogue.content["image"], axis=1) > 0.99).tolist() == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    with pytest.raises(UserError, match="--images DIR"):
        read_folder(folder, ["image"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_can_be_run(tmp_path: Path, split: str) -> None:
    folder = tiny_folder(tmp_path / "data")
    report = run_experiment(
        folder, "tiny", [0], directory=tmp_path / "runs", split=split, options=OPTIONS, device="cpu"
    )
    assert report["questions"] > 0
    assert report["split"] == split


def test_a_cold_item_is_found_by_its_content_alone(tmp_path: Path) -> None:
    """Content that tells the taste: cold items rank far above chance, which they cannot without content."""
    folder = tiny_folder(tmp_path / "data", users=120, items=80)
    found = {
        name: run_experiment(
            folder, "tiny", [0], directory=tmp_path / name, split="cold_items", modalities=modalities,
            options={"epochs": 8, "threads": 1}, device="cpu",
        )["metrics"]["masked"]["recall@20"]["mean"]
        for name, modalities in (("with", ("attributes",)), ("without", ()))
    }  # fmt: skip
    assert found["with"] > 0.4
    assert found["without"] == 0


def test_unknown_names_are_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data")
    with pytest.raises(UserError, match="no preset 'nosuch'; there are"):
        run_experiment(folder, "nosuch", [0], directory=tmp_path)
    with pytest.raises(UserError, match="no split 'nosuch'; there are"):
        run_experiment(folder, "tiny", [0], directory=tmp_path, split="nosuch")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_bears_its_own_name(name: str) -> None:
    assert preset(name).preset == name


@pytest.mark.parametrize("file_format", ["parquet", "csv", "jsonl"])
def test_every_format_reads_the_same(tmp_path: Path, file_format: str) -> None:
    ids, _, histories = read_folder(tiny_folder(tmp_path / "one", file_format=file_format))  # type: ignore[arg-type]
    expected_ids, _, expected = read_folder(tiny_folder(tmp_path / "other"))
    assert ids == expected_ids
    assert histories.user_ids == expected.user_ids
    assert histories.fingerprint() == expected.fingerprint()


def write(folder: Path, name: str, **columns: list[object]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


def test_events_are_ordered_by_time_then_by_their_place_in_the_file(tmp_path: Path) -> None:
    seconds = [5, 1, 1, 9]
    folder = write(
        tmp_path, "interactions", user_id=["a", "a", "a", "b"], item_id=["x", "z", "y", "x"],
        occurred_at=[pa.scalar(value * 10**6, pa.timestamp("us", "UTC")) for value in seconds],
    )  # fmt: skip
    ids, histories = read_interactions(folder, ["y"])
    assert ids == ["y", "x", "z"]
    assert [ids[item] for item in histories.of(0)] == ["z", "y", "x"]
    assert histories.times.tolist() == [10**6, 10**6, 5 * 10**6, 9 * 10**6]


def test_a_folder_without_items_has_the_items_of_its_events(tmp_path: Path) -> None:
    folder = write(
        tmp_path, "interactions", user_id=[1], item_id=[7], occurred_at=[pa.scalar(0, pa.timestamp("us", "UTC"))]
    )
    assert read_items(folder).num_rows == 0
    assert read_folder(folder)[0] == ["7"]


def test_bad_folders_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no interactions\.parquet"):
        read_interactions(tmp_path)
    folder = write(tmp_path / "columns", "interactions", user_id=["a"], occurred_at=["x"])
    with pytest.raises(UserError, match="no column item_id; it has user_id, occurred_at"):
        read_interactions(folder)
    folder = write(tmp_path / "times", "interactions", user_id=["a"], item_id=["b"], occurred_at=["yesterday"])
    with pytest.raises(UserError, match="occurred_at is not a time"):
        read_interactions(folder)
    folder = write(
        tmp_path / "empty", "interactions", user_id=["a", None], item_id=["b", "c"], occurred_at=[None, None]
    )
    with pytest.raises(UserError, match="row 2 has no user_id"):
        read_interactions(folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "interactions.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match=r"interactions.parquet: cannot be read as parquet"):
        read_interactions(tmp_path / "broken")
    (folder / "interactions.csv").write_text("user_id,item_id,occurred_at\n")
    with pytest.raises(UserError, match=r"both interactions.parquet and interactions.csv"):
        read_interactions(folder)


def test_options_change_the_preset_and_unknown_ones_are_refused() -> None:
    config = changed(preset("tiny"), {"epochs": 3, "towers.interests": 5, "objective": "comirec"})
    assert (config.epochs, config.towers.interests, config.objective) == (3, 5, "comirec")
    assert config.towers.dim == preset("tiny").towers.dim
    for options, message in (({"epoch": 3}, "epoch"), ({"towers.k": 3}, "k"), ({"epochs": "many"}, "not a number")):
        with pytest.raises(UserError, match=message):
            changed(preset("tiny"), options)
