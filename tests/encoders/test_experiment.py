"""Experiments: what they report, every split, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.config import changed
from encoders.content.registry import CONTENT_ENCODERS
from encoders.content.text import TextEncoder
from encoders.evaluation.comparison import differences
from encoders.experiments.controls import CONTROLS
from encoders.experiments.experiment import SPLITS, encoded_catalogue, run_experiment
from encoders.presets import PRESETS, preset
from pipelines.load.dataset import read_folder
from polytower.errors import UserError
from tests.encoders.checkpoints import bert
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
    assert set(report["baselines"]) == {"popularity", "item_knn", "tf_idf", "knn_tf_idf", "frozen"}
    assert report["seeds"] == [0, 1]
    assert report["epochs"] == [2, 2]


def test_controls_and_other_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    data, _ = read_folder(tiny_folder(tmp_path / "data"))

    def experiment(name: str, **options: object) -> dict[str, Any]:
        return run_experiment(data, "tiny", [0], directory=tmp_path / name, options=OPTIONS, device="cpu", **options)  # type: ignore[arg-type]

    one = experiment("one", modalities=["attributes"], controls=list(CONTROLS))
    assert set(one["controls"]) == set(CONTROLS)
    assert set(one["differences"]) == {*one["baselines"], *one["controls"]}
    for name, other in one["controls"].items():
        apart = one["differences"][name]["recall@10"]
        expected = one["metrics"]["masked"]["recall@10"]["mean"] - other["recall@10"]["mean"]
        assert apart["mean"] == pytest.approx(expected)
    assert sum(part["targets"] for part in one["segments"]["target_events"].values()) == one["questions"]
    again = experiment("two", modalities=["attributes"], against=tmp_path / "one")
    assert again["differences"][str(tmp_path / "one")]["ndcg@10"] == {"mean": 0, "error": 0}
    with pytest.raises(UserError, match="name the folder"):
        experiment("three", against=tmp_path)
    with pytest.raises(UserError, match="answers other questions"):
        experiment("four", against=tmp_path / "one", split="strong_generalisation")
    with pytest.raises(UserError, match="no control 'nosuch'; there are"):
        experiment("five", controls=["nosuch"])
    with pytest.raises(UserError, match="name it with --content"):
        experiment("five", controls=["permuted"])


def test_differences_by_hand() -> None:
    ours, theirs = torch.tensor([[1, 60, 20], [1, 20, 20]]), torch.tensor([[20, 20, 20]])
    found = differences(ours, theirs)
    assert found["recall@10"]["mean"] == pytest.approx(1 / 3)
    assert found["recall@10"]["error"] == pytest.approx(np.std([1, 0, 0], ddof=1) / 3**0.5)
    assert found["recall@50"]["mean"] == pytest.approx(-0.5 / 3)
    assert found["ndcg@10"]["mean"] == pytest.approx(1 / 3)


def test_content_is_encoded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    data, _ = read_folder(tiny_folder(tmp_path / "data"))
    first = encoded_catalogue(data, ["attributes"], cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("encoders.content.attributes.AttributesEncoder.encode_chunks", None)
        second = encoded_catalogue(data, ["attributes"], cache=cache)
    np.testing.assert_array_equal(first.content["attributes"], second.content["attributes"])
    np.testing.assert_array_equal(first.present["attributes"], second.present["attributes"])
    other, _ = read_folder(tiny_folder(tmp_path / "other", items=20))
    assert len(encoded_catalogue(other, ["attributes"], cache=cache).content["attributes"]) == 20


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
    data, _ = read_folder(tiny_folder(tmp_path / "data", queries=True))
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


def test_encoders_are_trained_too_and_compared_with_frozen_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(bert(tmp_path / "bert"))
    monkeypatch.setitem(CONTENT_ENCODERS, "text", lambda model, device: TextEncoder(folder, device=device))
    data, _ = read_folder(tiny_folder(tmp_path / "data"))
    options = {**OPTIONS, "towers.dim": 32, "towers.content_dim": 16, "towers.history": 16, "encoder_budget": 4}
    report = run_experiment(
        data, "em3", [0], directory=tmp_path / "runs", modalities=["text", "attributes"], options=options,
        device="cpu", controls=["frozen", "permuted", "equal_width"],
    )  # fmt: skip
    assert report["adapted"] == ["text"]
    assert set(report["controls"]) == {"frozen", "permuted", "equal_width"}
    written = {path.parent.parent.name: path.name for path in (tmp_path / "runs").rglob("adapter-*")}
    assert written == {"runs": "adapter-text.safetensors", "permuted": "adapter-text.safetensors"}
    with pytest.raises(UserError, match=r"attributes \(feature hashing \(256\)\).*LoRA needs a transformer"):
        run_experiment(data, "em3", [0], directory=tmp_path / "none", modalities=["attributes"], options=options)
