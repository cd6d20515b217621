"""Users' attributes: what they may change and what not, and that packing, padding and serving agree about them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from encoders.catalogue import Catalogue, Histories
from encoders.config import TowersConfig, TrainConfig
from encoders.content.attributes import AttributesEncoder, user_vectors
from encoders.evaluation.evaluate import TowersScorer, context_of, padded
from encoders.evaluation.splits import cold_items, cold_users, leave_one_out, strong_generalisation, temporal
from encoders.towers.interests import EXTRACTORS
from encoders.towers.model import ITEMS_ALONE, Context
from encoders.towers.towers import UserTower
from encoders.training import checkpoint
from encoders.training.packing import batches, pack
from encoders.training.train import train
from polytower.errors import UserError
from tests.encoders.data import ITEMS, histories_of, tiny_histories

WIDTH = 32
SHAPE = TowersConfig(dim=16, history=6, dropout=0.0, interests=2, user_attributes=WIDTH)


def tower_of(**changes: Any) -> UserTower:
    torch.manual_seed(0)
    tower = UserTower(replace(SHAPE, **changes))
    for parameter in tower.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return tower.eval()


def known(histories: Histories) -> Histories:
    """The same histories of users with a number and a group; every fifth user says nothing."""
    users = [{} if row % 5 == 4 else {"age": row, "group": f"g{row % 3}"} for row in range(len(histories))]
    return replace(histories, attributes=user_vectors(users, WIDTH))


def vectors(items: int = ITEMS) -> torch.Tensor:
    return F.normalize(torch.randn(items, SHAPE.dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def test_nothing_known_is_a_zero_row_and_the_rest_is_hashed_as_items_are() -> None:
    users = [{}, {"age": None, "tags": []}, {"age": 31, "tags": ["a", "b"]}, {"city": "Oslo"}]
    found = user_vectors(users, WIDTH)
    assert not found[:2].any()
    np.testing.assert_array_equal(found[2:], next(AttributesEncoder(WIDTH).encode(users[2:])))
    assert user_vectors([], WIDTH).shape == (0, WIDTH)


def test_without_attributes_or_signal_it_is_the_tower_as_it_was() -> None:
    torch.manual_seed(3)
    plain = UserTower(replace(SHAPE, user_attributes=0)).eval()
    torch.manual_seed(3)
    fresh = UserTower(SHAPE).eval()
    items, mask = vectors(5)[None], torch.ones(1, 5, dtype=torch.bool)
    some = Context(attributes=torch.from_numpy(user_vectors([{"age": 31}], WIDTH))[:, None])
    assert torch.equal(fresh.interests(items, mask, some).vectors, plain.interests(items, mask).vectors)
    taught = tower_of()
    silent = Context(attributes=torch.zeros(1, 1, WIDTH))
    assert torch.equal(taught.interests(items, mask, silent).vectors, taught.interests(items, mask).vectors)
    assert not torch.allclose(taught.interests(items, mask, some).vectors, taught.interests(items, mask).vectors)


@pytest.mark.parametrize("extractor", EXTRACTORS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), users=st.integers(1, 9))
def test_packed_rows_are_each_user_alone(extractor: str, seed: int, users: int) -> None:
    tower, items = tower_of(extractor=extractor, relative="time"), vectors()
    histories = known(tiny_histories(users, seed=seed, longest=SHAPE.history))
    rows = pack(histories, SHAPE.history, np.random.default_rng(seed), starts=True)
    for batch in batches(rows, 3, torch.device("cpu")):
        given = (items[batch.inputs] * batch.events[..., None], batch.positions, batch.allowed)
        packed = tower(*given, None, batch.context)
        places = torch.arange(SHAPE.history).flip(0).expand(len(batch.inputs), -1)
        asked = tower(*given, places, batch.context).vectors.flip(1)
        torch.testing.assert_close(asked, packed.vectors, atol=1e-5, rtol=1e-4)
        assert batch.context.attributes is not None
        for row, place in torch.nonzero(batch.valid).tolist():
            read = torch.nonzero(batch.allowed[row, place] & batch.events[row]).squeeze(1)
            history, mask = items[batch.inputs[row, read]][None], torch.ones(1, len(read), dtype=torch.bool)
            if not len(read):  # of an empty history
                history, mask = torch.full((1, 2, SHAPE.dim), 7.0), torch.zeros(1, 2, dtype=torch.bool)
            times = batch.context.times[row, read][None] if len(read) else torch.zeros(1, 2).long()
            alone = tower.interests(history, mask, Context(times, batch.context.attributes[row, place][None, None]))
            torch.testing.assert_close(packed.vectors[row, place], alone.vectors[0], atol=1e-5, rtol=1e-4)


def test_every_event_is_a_target_once_and_reads_its_own_user() -> None:
    histories = known(tiny_histories(users=20, longest=15))
    assert histories.attributes is not None
    rows = pack(histories, SHAPE.history, np.random.default_rng(0), starts=True)
    valid = rows.segments > 0
    assert sorted(rows.targets[valid].tolist()) == sorted(histories.items.tolist())
    first = histories.items[histories.offsets[:-1]].tolist()
    assert sorted(rows.targets[rows.inputs == -1].tolist()) == sorted(first)
    assert (rows.positions[rows.inputs == -1] == 0).all()
    for user in range(len(histories)):
        own = valid & (rows.owners == user)
        assert sorted(rows.targets[own].tolist()) == sorted(histories.of(user).tolist())
    (batch,) = batches(rows, len(rows), torch.device("cpu"))
    assert batch.context.attributes is not None
    np.testing.assert_array_equal(batch.context.attributes[batch.valid], histories.attributes[rows.owners[valid]])


def test_a_share_of_the_windows_does_without() -> None:
    histories = known(tiny_histories(users=200))
    rows = pack(histories, SHAPE.history, np.random.default_rng(0), silent=0.25)
    windows = {
        (row, segment): set(rows.owners[row][rows.segments[row] == segment].tolist())
        for row in range(len(rows))
        for segment in set(rows.segments[row].tolist()) - {0}
    }
    assert all(len(owners) == 1 for owners in windows.values())
    assert 0.15 < np.mean([owners == {-1} for owners in windows.values()]) < 0.35
    context = next(batches(rows, len(rows), torch.device("cpu"))).context
    assert context.attributes is not None
    assert not context.attributes[torch.from_numpy(rows.owners == -1)].any()


def test_splits_and_selections_keep_each_user_s_own() -> None:
    histories = known(tiny_histories(users=40))
    assert histories.attributes is not None
    own = dict(zip(histories.user_ids, histories.attributes, strict=True))
    for split in (leave_one_out, temporal, strong_generalisation, cold_users, lambda found: cold_items(found, ITEMS)):
        cut = split(histories)
        for part in (cut.train, cut.validation.histories, cut.test.histories):
            assert part.attributes is not None
            np.testing.assert_array_equal(part.attributes, np.array([own[user] for user in part.user_ids]))
    other = replace(histories, attributes=histories.attributes[::-1].copy())
    assert histories.fingerprint() == other.fingerprint()
    assert histories.fingerprint(*SHAPE.reads) != other.fingerprint(*SHAPE.reads)
    with pytest.raises(ValueError, match="39 rows of attributes for 40 users"):
        replace(histories, attributes=histories.attributes[:-1])


def groups(users: int) -> Histories:
    """Users of three groups, each with a taste of its own: a user's first events are of it, in no order."""
    rng = np.random.default_rng(0)
    sequences = {f"u{user}": rng.permutation(np.arange(user % 3, ITEMS, 3))[:6].tolist() for user in range(users)}
    return replace(
        histories_of(sequences), attributes=user_vectors([{"group": f"g{user % 3}"} for user in range(users)], WIDTH)
    )


def test_a_stranger_with_attributes_gets_the_taste_of_those_alike(tmp_path: Path) -> None:
    catalogue, histories = Catalogue([f"i{item}" for item in range(ITEMS)]), groups(90)
    config = TrainConfig(
        towers=SHAPE,
        epochs=16,
        batch_rows=8,
        negatives=0,
        threads=1,
        device="cpu",
        learning_rate=1e-2,
        initial="normal",
    )
    result = train(catalogue, histories, config, directory=tmp_path)
    scorer = TowersScorer(result.towers)
    strangers = replace(histories_of({"x": [], "y": [], "z": []}), attributes=histories.attributes[:3])
    best = scorer(strangers).topk(5).indices
    assert (best % 3 == torch.arange(3)[:, None]).sum(dim=1).min() >= 4
    served = checkpoint.load_user_tower(*checkpoint.user_tower_bytes(result.towers))
    assert served.config.reads == ("attributes",)
    inputs, mask = padded(histories, SHAPE.history)
    found = served.interests(scorer.items_VD[inputs], mask, context_of(histories, served.config))
    torch.testing.assert_close(found.vectors, scorer.interests(histories).vectors)
    silent = served.interests(scorer.items_VD[inputs], mask, ITEMS_ALONE)
    assert not torch.allclose(found.vectors, silent.vectors, atol=1e-3)


def test_an_unfinished_run_refuses_users_who_changed(tmp_path: Path) -> None:
    catalogue, histories = Catalogue([f"i{item}" for item in range(ITEMS)]), groups(30)
    config = TrainConfig(towers=SHAPE, epochs=3, negatives=0, threads=1, device="cpu")

    def stop(point: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(catalogue, histories, config, directory=tmp_path, on_epoch=stop)
    assert histories.attributes is not None
    changed = replace(histories, attributes=histories.attributes[::-1].copy())
    with pytest.raises(UserError, match="other data"):
        train(catalogue, changed, config, directory=tmp_path)


def test_towers_that_read_what_is_not_there_are_not_trained(tmp_path: Path) -> None:
    catalogue, config = Catalogue([f"i{item}" for item in range(ITEMS)]), TrainConfig(towers=SHAPE)
    with pytest.raises(UserError, match="=32, but the users' attributes bring none"):
        train(catalogue, tiny_histories(), config, directory=tmp_path)
    wide = replace(config, towers=replace(SHAPE, user_attributes=64))
    with pytest.raises(UserError, match="=64, but the users' attributes bring 32 numbers"):
        train(catalogue, known(tiny_histories()), wide, directory=tmp_path)


@pytest.mark.parametrize("options", [{"user_attributes": 30}, {"user_attributes": -4}, {"silent_users": 1.5}], ids=str)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        TrainConfig(towers=TowersConfig(**options))
