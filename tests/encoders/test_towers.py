"""Towers: what they may depend on, and what they may not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.fusion import FUSIONS
from encoders.towers.interests import EXTRACTORS, READ_QUERY_ONLY
from encoders.towers.towers import Towers, UserTower
from tests.encoders.data import ITEMS, tiny_catalogue

CONFIG = TowersConfig(dim=16, history=8, dropout=0.3, interests=3, content_width=16, shrinkage=2.0)


def towers_of(catalogue: Catalogue, **changes: object) -> Towers:
    torch.manual_seed(0)
    return Towers(replace(CONFIG, modalities=catalogue.modalities, **changes), catalogue).eval()  # type: ignore[arg-type]


def user_tower(**changes: object) -> UserTower:
    torch.manual_seed(0)
    tower = UserTower(replace(CONFIG, **changes))  # type: ignore[arg-type]
    torch.nn.init.normal_(tower.weigh.weight)
    return tower.eval()


def histories_of_vectors(users: int, length: int) -> torch.Tensor:
    return F.normalize(torch.randn(users, length, CONFIG.dim, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_padding_never_changes_an_interest(extractor: str) -> None:
    tower, items = user_tower(extractor=extractor), histories_of_vectors(1, 5)
    plain = tower.interests(items, torch.ones(1, 5, dtype=torch.bool))
    for spots in ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 6, 7]):
        padded, mask = torch.full((1, 9, CONFIG.dim), 7.0), torch.zeros(1, 9, dtype=torch.bool)
        padded[:, spots], mask[:, spots] = items, True
        found = tower.interests(padded, mask)
        torch.testing.assert_close(found.vectors, plain.vectors)
        torch.testing.assert_close(found.weights, plain.weights)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_the_company_of_a_batch_never_changes_an_interest(extractor: str) -> None:
    tower, items = user_tower(extractor=extractor), histories_of_vectors(4, 6)
    lengths = torch.tensor([6, 1, 4, 3])
    mask = torch.arange(6) < lengths[:, None]
    together = tower.interests(items, mask)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = tower.interests(items[order], mask[order])
    torch.testing.assert_close(shuffled.vectors, together.vectors[order])
    for user in range(4):
        alone = tower.interests(items[user : user + 1, : lengths[user]], mask[user : user + 1, : lengths[user]])
        torch.testing.assert_close(alone.vectors[0], together.vectors[user])
        torch.testing.assert_close(alone.weights[0], together.weights[user])


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_packed_training_rows_and_serving_agree(extractor: str) -> None:
    """Two users in one packed row: the interests at their last positions are those of each user alone."""
    tower, items = user_tower(extractor=extractor), histories_of_vectors(1, 7)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2]])
    allowed = torch.ones(7, 7, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None, :])
    packed = tower(items, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), allowed)
    for part, last in ((slice(0, 4), 3), (slice(4, 7), 6)):
        alone = tower.interests(items[:, part], torch.ones(1, part.stop - part.start, dtype=torch.bool))
        torch.testing.assert_close(packed.vectors[:, last], alone.vectors)


@pytest.mark.parametrize("extractor", sorted(READ_QUERY_ONLY))
def test_work_at_the_query_positions_alone_gives_the_same_states(extractor: str) -> None:
    tower, items = user_tower(extractor=extractor, blocks=2), histories_of_vectors(3, 7)
    allowed, queries = torch.ones(3, 7, 7, dtype=torch.bool).tril(), torch.tensor([[6, 2], [0, 0], [3, 5]])
    positions = torch.arange(7).expand(3, -1)
    every = tower.backbone(items, positions, allowed)
    asked = tower.backbone(items, positions, allowed, queries)
    torch.testing.assert_close(asked, torch.stack([every[user, queries[user]] for user in range(3)]))


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_only_the_newest_events_count_and_their_order_does(extractor: str) -> None:
    tower, items = user_tower(extractor=extractor), histories_of_vectors(1, 20)
    every = torch.ones(1, 20, dtype=torch.bool)
    newest = tower.interests(items[:, -CONFIG.history :], every[:, -CONFIG.history :])
    torch.testing.assert_close(tower.interests(items, every).vectors, newest.vectors)
    turned = tower.interests(items.flip(1), every)
    assert not torch.allclose(turned.vectors, newest.vectors, atol=1e-3)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_interests_are_unit_and_weights_a_distribution(extractor: str) -> None:
    found = user_tower(extractor=extractor).interests(
        histories_of_vectors(3, 4), torch.tensor([[True] * 4, [True] + [False] * 3, [False] * 4])
    )
    assert found.vectors.shape == (3, 3, CONFIG.dim)
    torch.testing.assert_close(found.vectors[:2].norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones(3))
    assert torch.isfinite(found.vectors).all()


def test_a_short_history_uses_few_interests_when_adaptive() -> None:
    mask = torch.arange(8) < torch.tensor([1, 3, 4, 8])[:, None]
    found = user_tower(adaptive=True).interests(histories_of_vectors(4, 8), mask)
    assert (found.weights > 0).sum(dim=1).tolist() == [1, 1, 2, 3]


def test_no_future_event_changes_a_state() -> None:
    tower, items = user_tower(), histories_of_vectors(1, 6)
    allowed = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    changed = items.clone()
    changed[:, 4:] = items[:, :2]
    before = tower(items, torch.arange(6)[None], allowed)
    after = tower(changed, torch.arange(6)[None], allowed)
    torch.testing.assert_close(before.vectors[:, :4], after.vectors[:, :4])
    assert not torch.allclose(before.vectors[:, 4:], after.vectors[:, 4:])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_missing_modality_is_a_masked_one(fusion: str) -> None:
    catalogue = tiny_catalogue()
    loud = {name: rows.copy() for name, rows in catalogue.content.items()}
    for name, rows in loud.items():
        rows[~catalogue.present[name]] = 99.0
    quiet = towers_of(catalogue, fusion=fusion).item_embeddings()
    masked = towers_of(Catalogue(catalogue.item_ids, loud, catalogue.present), fusion=fusion).item_embeddings()
    torch.testing.assert_close(quiet.content, masked.content)
    torch.testing.assert_close(quiet.item, masked.item)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_modality_that_is_present_matters(fusion: str) -> None:
    catalogue = tiny_catalogue()
    whole = towers_of(catalogue, fusion=fusion).item_embeddings()
    for name in catalogue.content:
        content = {**catalogue.content, name: np.roll(catalogue.content[name], 1, axis=1)}
        other = towers_of(Catalogue(catalogue.item_ids, content, catalogue.present), fusion=fusion).item_embeddings()
        assert not torch.allclose(other.content[0], whole.content[0], atol=1e-4)


def test_embeddings_are_unit_and_cold_items_stand_on_their_content() -> None:
    towers = towers_of(tiny_catalogue())
    towers.item_tower.counts[:5] = 0
    found = towers.item_embeddings()
    torch.testing.assert_close(found.item[:5], found.content[:5])
    assert not found.has_id[:5].any()
    assert (found.id[:5] == 0).all()
    for rows, there in ((found.content, found.has_content), (found.id, found.has_id)):
        torch.testing.assert_close(rows.norm(dim=1), there.float())
    assert not found.has_content[-1]
    torch.testing.assert_close(found.item[-1], found.id[-1])


def test_content_weighs_less_the_more_events_an_item_has() -> None:
    towers = towers_of(tiny_catalogue())
    towers.item_tower.counts.copy_(torch.arange(float(ITEMS)))
    share = towers.item_tower.share(torch.arange(ITEMS))
    assert share[0] == 1
    assert (share.diff() < 0).all()
    assert share[2].item() == pytest.approx(0.5)


def test_without_shrinkage_content_stays_out_of_warm_items() -> None:
    found = towers_of(tiny_catalogue(), shrinkage=0.0).item_embeddings()
    torch.testing.assert_close(found.item, found.id)


def test_towers_over_another_catalogue_keep_what_was_learned() -> None:
    catalogue = tiny_catalogue()
    towers = towers_of(catalogue)
    order = np.array([4, 2, 0, 9])
    smaller = Catalogue(
        [*(catalogue.item_ids[row] for row in order[:3]), "new"],
        {name: rows[order] for name, rows in catalogue.content.items()},
        {name: rows[order] for name, rows in catalogue.present.items()},
    )
    before, after = towers.item_embeddings(), towers.over(catalogue.item_ids, smaller).item_embeddings()
    torch.testing.assert_close(after.item[:3], before.item[order[:3]])
    torch.testing.assert_close(after.item[3], before.content[9])


def test_a_catalogue_of_other_modalities_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read"):
        Towers(CONFIG, tiny_catalogue())
