"""Checkpoints come back as they were, parts alone too, and refuse what they do not belong to."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig
from encoders.towers.towers import Towers
from encoders.training import checkpoint
from polytower.errors import UserError
from tests.encoders.data import tiny_catalogue

SHAPE = TowersConfig(dim=16, history=8, interests=3, content_width=16, shrinkage=1.0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Towers, Catalogue]:
    catalogue = tiny_catalogue()
    towers = Towers(replace(SHAPE, modalities=catalogue.modalities), catalogue).eval()
    checkpoint.save(tmp_path, towers, TrainConfig(towers=SHAPE), catalogue, metrics={"ndcg@10": 0.5})
    return tmp_path, towers, catalogue


def test_towers_come_back_as_they_were(saved: tuple[Path, Towers, Catalogue]) -> None:
    directory, towers, catalogue = saved
    loaded, config, metrics = checkpoint.load(directory, catalogue)
    for one, other in zip(loaded.item_embeddings(), towers.item_embeddings(), strict=True):
        assert torch.equal(one, other)
    assert config == TrainConfig(towers=SHAPE)
    assert metrics == {"ndcg@10": 0.5}
    assert not list(directory.glob("*.partial"))


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Inside, the system refuses to let any file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_and_what_was_there_stays(saved: tuple[Path, Towers, Catalogue]) -> None:
    directory, towers, catalogue = saved
    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    told = r"cannot be written: .*File too large.*run the same command again: what was finished before is kept"
    with files_end_at(1000), pytest.raises(UserError, match=rf"towers\.safetensors {told}"):
        checkpoint.save(directory, towers, TrainConfig(towers=SHAPE), catalogue)
    with files_end_at(10), pytest.raises(UserError, match=rf"towers\.json {told}"):
        checkpoint.write_json(directory / "towers.json", {"format": "long enough"})
    (directory / "file").touch()
    with pytest.raises(UserError, match=r"note.json cannot be written: File exists"):
        checkpoint.write_json(directory / "file" / "note.json", {})
    (directory / "file").unlink()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == kept


def test_a_document_belongs_to_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert checkpoint.read_document(path) is None
    checkpoint.write_tensors(path, {"x": torch.ones(2)}, {"epoch": 3})
    assert checkpoint.read_document(path) == {"epoch": 3}
    checkpoint.write_tensors(path, {"x": torch.ones(2)})
    assert checkpoint.read_document(path) is None
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_document(path)


def test_the_user_tower_alone_answers_the_same(saved: tuple[Path, Towers, Catalogue]) -> None:
    _, towers, _ = saved
    weights, config = checkpoint.user_tower_bytes(towers)
    alone = checkpoint.load_user_tower(weights, checkpoint.as_json(config))
    items, mask = torch.randn(2, 5, SHAPE.dim), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(alone.interests(items, mask).vectors, towers.user_interests(items, mask).vectors)
    assert len(weights) < 500_000


def test_the_content_tower_alone_answers_the_same(saved: tuple[Path, Towers, Catalogue]) -> None:
    _, towers, catalogue = saved
    stored = checkpoint.content_tower_bytes(towers)
    assert stored is not None
    alone = checkpoint.load_content_tower(stored[0], checkpoint.as_json(stored[1]))
    content = {name: torch.from_numpy(rows) for name, rows in catalogue.content.items()}
    present = {name: torch.from_numpy(rows) for name, rows in catalogue.present.items()}
    found = towers.item_embeddings()
    with torch.no_grad():
        assert torch.equal(alone(content, present)[found.has_content], found.content[found.has_content])


def test_towers_without_content_have_no_content_tower() -> None:
    towers = Towers(TowersConfig(dim=8), Catalogue(["a"], {}, {}))
    assert checkpoint.content_tower_bytes(towers) is None


def test_another_catalogue_is_refused(saved: tuple[Path, Towers, Catalogue]) -> None:
    directory, _, catalogue = saved
    turned = Catalogue(catalogue.item_ids[::-1], catalogue.content, catalogue.present)
    with pytest.raises(UserError, match="another catalogue"):
        checkpoint.load(directory, turned)


def test_other_modalities_are_refused(saved: tuple[Path, Towers, Catalogue]) -> None:
    directory, _, catalogue = saved
    text = Catalogue(catalogue.item_ids, {"text": catalogue.content["text"]}, {"text": catalogue.present["text"]})
    with pytest.raises(UserError, match=r"trained with content attributes \(8\), text \(12\)"):
        checkpoint.load(directory, text)


def test_an_absent_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere", tiny_catalogue())


@pytest.mark.parametrize("name", ["towers.safetensors", "towers.json"])
def test_a_damaged_checkpoint_is_said(saved: tuple[Path, Towers, Catalogue], name: str) -> None:
    directory, _, catalogue = saved
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(directory, catalogue)


def test_weights_of_another_configuration_are_refused(saved: tuple[Path, Towers, Catalogue]) -> None:
    _, towers, _ = saved
    weights, config = checkpoint.user_tower_bytes(towers)
    with pytest.raises(UserError, match="another configuration"):
        checkpoint.load_user_tower(weights, {**config, "dim": 32})


def test_a_newer_format_is_refused(saved: tuple[Path, Towers, Catalogue]) -> None:
    directory, _, catalogue = saved
    document = checkpoint.read_json(directory / "towers.json")
    checkpoint.write_json(directory / "towers.json", {**document, "format": 99})
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(directory, catalogue)
