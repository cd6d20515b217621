"""The preset mtmi: its parts do what their switches say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encoders.catalogue import Catalogue
from encoders.config import TrainConfig, changed
from encoders.evaluation.evaluate import TowersScorer, interests_report
from encoders.presets import preset
from encoders.towers.towers import Towers
from encoders.training.train import TrainResult, train
from tests.encoders.data import tiny_catalogue, tiny_histories

SMALL = {
    "towers.dim": 16, "towers.history": 8, "towers.whiten": 8, "epochs": 6, "batch_rows": 4, "validate_every": 3,
    "threads": 1, "device": "cpu",
}  # fmt: skip


def config(**options: Any) -> TrainConfig:
    return changed(preset("mtmi"), SMALL | options)


def trained(directory: Path, catalogue: Catalogue | None = None, **options: Any) -> TrainResult:
    return train(catalogue or tiny_catalogue(), tiny_histories(), config(**options), directory=directory)


def cosine(result: TrainResult) -> float:
    scorer = TowersScorer(result.evaluated, softness=result.config.softness)
    found = interests_report(scorer, result.split.validation)["cosine"]
    assert isinstance(found, float)
    return found


def test_its_interests_are_of_several_towers_and_repel_each_other(tmp_path: Path) -> None:
    result = trained(tmp_path / "mtmi")
    assert isinstance(result.towers, Towers)
    assert len(result.towers.user_tower.backbone.each) == 4
    assert result.config.softness == result.config.temperature
    strong = trained(tmp_path / "strong", repel_weight=2.0)
    assert cosine(strong) < cosine(trained(tmp_path / "none", repel_weight=0.0)) - 0.02


def test_content_is_part_of_its_items_where_there_is_any(tmp_path: Path) -> None:
    result = trained(tmp_path / "mtmi")
    items = result.towers.item_embeddings()
    both = items.has_content & items.has_id
    assert (items.item - items.id)[both].norm(dim=1).max() > 0.1
    by_id = trained(tmp_path / "by_id", **{"towers.shrinkage": 0.0}).towers.item_embeddings()
    assert (by_id.item - by_id.id)[both].norm(dim=1).max() < 1e-6
    bare = trained(tmp_path / "bare", tiny_catalogue(content=False))
    assert bare.metrics["ndcg@10"] > 0


@pytest.mark.parametrize(
    "part", [{"towers.extractor": "heads"}, {"objective": "comirec"}, {"repel": "orthogonal"}, {"towers.interests": 1}]
)
def test_each_part_is_a_switch(tmp_path: Path, part: dict[str, Any]) -> None:
    result = train(tiny_catalogue(), tiny_histories(), replace(config(**part), epochs=1), directory=tmp_path)
    assert result.metrics["ndcg@10"] > 0
