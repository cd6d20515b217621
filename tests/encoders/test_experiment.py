"""Experiments: what they report, every split, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from encoders.config import changed
from encoders.experiments.experiment import SPLITS, encoded_catalogue, run_experiment
from encoders.presets import PRESETS, preset
from pipelines.load.dataset import read_folder
from polytower.errors import UserError
from tests.factories import tiny_folder

OPTIONS = {"epochs": 2, "threads": 1}


def test_an_experiment_reports_mean_and_spread_beside_the_baselines(tmp_path: Path) -> None:
    data, _ = read_folder(tiny_folder(tmp_path / "data"))
    report = run_experiment(
        data, "tiny", [0, 1], directory=tmp_path / "runs", modalities=["attributes"], options=OPTIONS, device="cpu"
    )
    assert json.loads(json.dumps(report)) == report
    assert {"data", "preset", "seeds", "parameters", "seconds_per_epoch", "epochs"} <= set(report)
    assert set(report["metrics"]["masked"]["ndcg@10"]) == {"mean", "std"}
    assert set(report["baselines"]) == {"popularity", "item_knn"}
    assert report["seeds"] == [0, 1]
    assert report["epochs"] == [2, 2]


def test_pictures_are_read_from_their_folder_and_bad_ones_count_as_none(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data", items=6, images=True)
    (folder / "images" / "i1.jpg").write_bytes(b"no picture")
    (folder / "images" / "i2.jpg").unlink()
    data, _ = read_folder(folder)
    catalogue = encoded_catalogue(data, ["image"], images=folder / "images", device="cpu")
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
        encoded_catalogue(data, ["image"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_can_be_run(tmp_path: Path, split: str) -> None:
    data, _ = read_folder(tiny_folder(tmp_path / "data"))
    report = run_experiment(data, "tiny", [0], directory=tmp_path / "runs", split=split, options=OPTIONS, device="cpu")
    assert report["questions"] > 0
    assert report["split"] == split


def test_a_cold_item_is_found_by_its_content_alone(tmp_path: Path) -> None:
    """Content that tells the taste: cold items rank far above chance, which they cannot without content."""
    data, _ = read_folder(tiny_folder(tmp_path / "data", users=120, items=80))
    found = {
        name: run_experiment(
            data, "tiny", [0], directory=tmp_path / name, split="cold_items", modalities=modalities,
            options={"epochs": 8, "threads": 1}, device="cpu",
        )["metrics"]["masked"]["recall@20"]["mean"]
        for name, modalities in (("with", ("attributes",)), ("without", ()))
    }  # fmt: skip
    assert found["with"] > 0.4
    assert found["without"] == 0


def test_unknown_names_are_said(tmp_path: Path) -> None:
    data, _ = read_folder(tiny_folder(tmp_path / "data"))
    with pytest.raises(UserError, match="no preset 'nosuch'; there are"):
        run_experiment(data, "nosuch", [0], directory=tmp_path)
    with pytest.raises(UserError, match="no split 'nosuch'; there are"):
        run_experiment(data, "tiny", [0], directory=tmp_path, split="nosuch")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_bears_its_own_name(name: str) -> None:
    assert preset(name).preset == name


def test_options_change_the_preset_and_unknown_ones_are_refused() -> None:
    config = changed(preset("tiny"), {"epochs": 3, "towers.interests": 5, "objective": "comirec"})
    assert (config.epochs, config.towers.interests, config.objective) == (3, 5, "comirec")
    assert config.towers.dim == preset("tiny").towers.dim
    for options, message in (({"epoch": 3}, "epoch"), ({"towers.k": 3}, "k"), ({"epochs": "many"}, "not a number")):
        with pytest.raises(UserError, match=message):
            changed(preset("tiny"), options)
