"""MMSRec: subsets of modalities, masks, the contrast by hand, leakage, and catalogues that it has never seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluation.evaluate import TowersScorer, padded, validation_ndcg
from encoders.evaluation.splits import leave_one_out
from encoders.presets import preset
from encoders.towers.losses import combinations_contrast, info_nce
from encoders.towers.mmsrec import MMSRec
from encoders.training import checkpoint, contrast, masked
from encoders.training.start import SUMMARY, initial_encoder, read_start
from encoders.training.train import Epoch, train
from polytower.errors import UserError
from tests.encoders.data import histories_of, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(family="mmsrec", dim=16, heads=4, blocks=2, history=6, dropout=0.2, interests=1)
CONFIG = TrainConfig(
    "mmsrec", SHAPE, epochs=4, pretrain_epochs=2, pretrain_items=8, batch_rows=8, negatives=0, temperature=0.05,
    learning_rate=5e-3, validate_every=2, initial="normal", device="cpu", threads=1,
)  # fmt: skip
ENCODERS = {"text": "t1", "attributes": "a1"}


def model_of(catalogue: Catalogue, **changes: object) -> MMSRec:
    torch.manual_seed(0)
    shape = replace(SHAPE, modalities=catalogue.modalities, **changes)  # type: ignore[arg-type]
    return MMSRec(shape, catalogue).eval()


def content(*rows: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Items that have (attributes?, text?), with rows of noise where they have not."""
    rng = torch.Generator().manual_seed(1)
    made = {"attributes": torch.randn(len(rows), 8, generator=rng), "text": torch.randn(len(rows), 12, generator=rng)}
    present = torch.tensor(rows, dtype=torch.bool)
    return made, {"attributes": present[:, 0], "text": present[:, 1]}


def test_an_item_is_a_history_of_length_one_seen_through_any_subset_of_modalities() -> None:
    encoder = model_of(tiny_catalogue()).user_tower
    rows, present = content((1, 1), (1, 0), (0, 1), (0, 0))
    with torch.no_grad():
        found = encoder(rows, present)
    assert torch.allclose(found.norm(dim=1), torch.tensor([1.0, 1, 1, 0]))
    assert len({tuple(row.tolist()) for row in found}) == 4
    # the same row, seen with other modalities
    same = {name: values[:1].expand(3, -1) for name, values in rows.items()}
    seen = {"attributes": torch.tensor([True, True, False]), "text": torch.tensor([True, False, True])}
    with torch.no_grad():
        assert (encoder(same, seen) @ encoder(same, seen).T - torch.eye(3)).abs().max() > 1e-3


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_masked_is_as_if_it_had_never_been_there(data: st.DataObject) -> None:
    catalogue = tiny_catalogue()
    encoder = model_of(catalogue).user_tower
    flags = st.tuples(st.integers(0, 1), st.integers(0, 1))
    rows, present = content(*data.draw(st.lists(flags, min_size=1, max_size=5)))
    other = {name: torch.where(present[name][:, None], values, 7 * values + 1) for name, values in rows.items()}
    gone = {name: values * present[name][:, None] for name, values in rows.items()}
    everywhere = {name: torch.ones_like(there) for name, there in present.items()}
    with torch.no_grad():
        one, two, three = encoder(rows, present), encoder(other, present), encoder(gone, everywhere)
        assert torch.equal(one, two)
        assert torch.equal(one, three)  # a zero row says nothing, with a mask or without one
        # as events of a history: side by side, zeros for what is missing
        events = torch.cat([gone["attributes"], gone["text"]], dim=1)[None]
        known = (events[0] != 0).any(dim=1)
        whole = encoder.interests(events, torch.ones(events.shape[:2], dtype=torch.bool)).vectors
        left = encoder.interests(events[:, known], torch.ones(1, int(known.sum()), dtype=torch.bool)).vectors
    assert torch.allclose(whole, left, atol=1e-5)


def test_padding_changes_nothing_and_the_newest_events_count() -> None:
    catalogue = tiny_catalogue()
    model = model_of(catalogue)
    rows, _ = padded(histories_of({"a": [0, 4, 7, 2, 1, 5, 9, 3]}), 8)
    events = model.events(rows, torch.empty(0))
    alone = model.user_interests(events, torch.ones(1, 8, dtype=torch.bool)).vectors
    newest = model.user_interests(events[:, 2:], torch.ones(1, 6, dtype=torch.bool)).vectors
    wide = torch.cat([torch.randn(1, 3, 20), events, torch.randn(1, 2, 20)], dim=1)
    mask = torch.zeros(1, 13, dtype=torch.bool)
    mask[:, 3:11] = True
    assert torch.allclose(alone, newest, atol=1e-6)
    assert torch.allclose(alone, model.user_interests(wide, mask).vectors, atol=1e-6)
    turned = model.user_interests(events.flip(1), torch.ones(1, 8, dtype=torch.bool)).vectors
    assert not torch.allclose(alone, turned, atol=1e-3)
    nobody = model.user_interests(events, torch.zeros(1, 8, dtype=torch.bool)).vectors
    assert torch.allclose(nobody.norm(dim=-1), torch.ones(1, 1))


def test_the_contrast_by_hand() -> None:
    def unit(*rows: list[float]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)

    v1, v2 = unit([1, 0], [0, 1]), unit([1, 1], [0, 1])
    t1, t2 = unit([1, 0.5], [1, -1]), unit([0, 1], [1, 0])
    w1, w2 = unit([1, 2], [2, 1]), unit([1, 3], [3, 1])

    def by_hand(a: Tensor, b: Tensor) -> float:
        scores = (a.numpy() @ b.numpy().T) / 0.5
        rows = [-np.log(np.exp(scores[n, n]) / np.exp(scores[n]).sum()) for n in range(2)]
        columns = [-np.log(np.exp(scores[n, n]) / np.exp(scores[:, n]).sum()) for n in range(2)]
        return float((np.mean(rows) + np.mean(columns)) / 2)

    there = torch.ones(2, 2, dtype=torch.bool)
    expected = (by_hand(v1, v2) + by_hand(v1, t1) + by_hand(t1, t2) + by_hand(w1, w2)) / 4
    found = combinations_contrast([(v1, v2), (t1, t2)], there, (w1, w2), 0.5)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    # one that lacks t: only v with itself and the whole still have two items
    found = combinations_contrast([(v1, v2), (t1, t2)], torch.tensor([[1, 1], [1, 0]]).bool(), (w1, w2), 0.5)
    assert float(found) == pytest.approx((by_hand(v1, v2) + by_hand(w1, w2)) / 2, abs=1e-6)
    assert float(combinations_contrast([(v1, v2)], there[:, :1], (v1, v2), 0.5)) == pytest.approx(by_hand(v1, v2))
    assert float(combinations_contrast([(v1, v2)], ~there[:, :1], (v1, v2), 0.5)) == 0
    assert float(info_nce(v1, v2, 0.5)) == pytest.approx(by_hand(v1, v2))


def test_the_contrast_sees_each_view_with_its_own_modalities() -> None:
    catalogue = tiny_catalogue()
    model = model_of(catalogue, dropout=0.0)
    items = torch.from_numpy(np.flatnonzero(masked.described(catalogue))[:6])
    found, _ = contrast.loss(model, contrast.ItemBatch(items), CONFIG, items, items)
    rows, present = model.content_of(items)

    def seen(*names: str) -> Tensor:
        return model.user_tower(rows, {name: there & (name in names) for name, there in present.items()})

    views = [(seen(name), seen(name)) for name in ("attributes", "text")]
    there = torch.stack(list(present.values()), dim=1)
    whole = seen("attributes", "text")
    assert float(found) == pytest.approx(
        float(combinations_contrast(views, there, (whole, whole), 0.05).detach()), rel=1e-4
    )


def test_the_hidden_item_cannot_reach_its_own_guess() -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    model = model_of(catalogue)
    rows = masked.rows(catalogue, histories, CONFIG, np.random.default_rng(0))
    batch = next(masked.batches(rows, 8, torch.device("cpu")))
    flat = batch.items.flatten()
    tokens, present = model.user_tower.tokens(*model.content_of(flat))
    hidden = batch.masked.flatten()
    with torch.no_grad():
        before = masked.guesses(model, batch, tokens, present)
        other = torch.where(hidden[:, None, None], torch.randn_like(tokens), tokens)
        after = masked.guesses(model, batch, other, torch.where(hidden[:, None], ~present, present))
        assert torch.equal(before, after)
        visible = ~hidden & batch.real.flatten()
        assert not torch.allclose(before, masked.guesses(model, batch, tokens + visible[:, None, None], present))


def test_the_last_event_is_always_hidden_and_items_without_content_are_no_events() -> None:
    catalogue = tiny_catalogue()
    silent = len(catalogue) - 1
    assert not masked.described(catalogue)[silent]
    histories = histories_of({"long": [0, 1, silent, *range(3, 20)], "short": [4, silent], "two": [5, 6]})
    seen: list[int] = []
    for epoch in range(20):
        rows = masked.rows(catalogue, histories, CONFIG, np.random.default_rng(epoch))
        assert silent not in rows.items
        for items, hidden in zip(rows.items, rows.masked, strict=True):
            length = int((items >= 0).sum())
            assert 2 <= length <= SHAPE.history + 1
            assert hidden[length - 1]
            assert not hidden[length:].any()
        assert 1 not in rows.owners  # one event is left of it
        seen.append(int(rows.masked.sum()) - len(rows))
    assert 0.1 < np.mean(seen) / 15 < 0.3


def test_training_serves_histories_as_it_was_taught(tmp_path: Path) -> None:
    """The guess for a last item in training is the interest of the history before it."""
    catalogue = tiny_catalogue()
    model = model_of(catalogue)
    items = [0, 4, 7, 2, 5]
    batch = masked.MaskedBatch(
        torch.tensor([items]), torch.ones(1, 5, dtype=torch.bool), torch.tensor([[False] * 4 + [True]]),
        torch.tensor([[4, 3, 2, 1, 0]]), torch.tensor([5]), [0],
    )  # fmt: skip
    with torch.no_grad():
        guess = masked.guesses(model, batch, *model.user_tower.tokens(*model.content_of(torch.tensor(items))))
    events = model.events(torch.tensor([items[:4]]), torch.empty(0))
    served = model.user_interests(events, torch.ones(1, 4, dtype=torch.bool)).vectors[0]
    assert torch.allclose(guess, served, atol=1e-6)


def test_it_learns_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    config = replace(CONFIG, epochs=12)
    result = train(catalogue, histories, config, directory=tmp_path)
    assert result.curves[-1].loss < result.curves[0].loss - 0.3
    start = train(catalogue, histories, replace(config, epochs=0, pretrain_epochs=1), directory=tmp_path / "no")
    assert result.metrics["ndcg@10"] > start.metrics["ndcg@10"] + 0.1
    assert (start.best_epoch, len(start.curves)) == (0, 0)
    loaded, _, metrics = checkpoint.load(tmp_path, catalogue)
    assert metrics == result.metrics
    assert torch.equal(loaded.item_embeddings().item, result.towers.item_embeddings().item)
    reader = checkpoint.load_user_tower(*checkpoint.user_tower_bytes(loaded))
    stored = checkpoint.content_tower_bytes(loaded)
    assert stored is not None
    asked = checkpoint.load_content_tower(*stored)
    assert reader.reads == catalogue.modalities == tuple(asked.widths.items())
    rows, mask = padded(histories, SHAPE.history)
    with torch.no_grad():
        served = reader.interests(loaded.events(rows, torch.empty(0)), mask).vectors
        assert torch.equal(served, loaded.user_interests(loaded.events(rows, torch.empty(0)), mask).vectors)


class KilledError(Exception):
    """Stands for SIGKILL after an epoch."""


def test_a_killed_training_goes_on_to_the_same_loss(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    whole = train(catalogue, histories, CONFIG, directory=tmp_path / "whole")

    def kill(point: Epoch) -> None:
        if point.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(catalogue, histories, CONFIG, directory=tmp_path / "killed", on_epoch=kill)
    resumed = train(catalogue, histories, CONFIG, directory=tmp_path / "killed")
    assert [point.loss for point in resumed.curves] == [point.loss for point in whole.curves]
    assert not [*(tmp_path / "killed").rglob("state.safetensors")]


def test_a_catalogue_that_it_has_never_seen(tmp_path: Path) -> None:
    """Served without training it is ahead of an untrained one; a modality may be missing, or be new."""
    seen, histories = tiny_catalogue(), tiny_histories()
    result = train(seen, histories, replace(CONFIG, epochs=12), directory=tmp_path)
    checkpoint.write_json(tmp_path / SUMMARY, {"encoders": ENCODERS})
    order = np.random.default_rng(3).permutation(len(seen))[:24]
    unseen = Catalogue(
        [f"other{n}" for n in range(24)],
        {name: rows[order] for name, rows in seen.content.items()},
        {name: there[order] for name, there in seen.present.items()},
    )
    place = {int(item): n for n, item in enumerate(order)}
    walks = {
        user: [place[int(item)] for item in histories.of(n) if int(item) in place]
        for n, user in enumerate(histories.user_ids)
    }
    others = histories_of({user: walk for user, walk in walks.items() if len(walk) > 3})
    start, told = read_start(tmp_path, unseen, ENCODERS)
    assert told == []
    ready = train(
        unseen, others, replace(CONFIG, epochs=0, pretrain_epochs=0), directory=tmp_path / "ready", start=start
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = initial_encoder(unseen, others, replace(CONFIG, towers=result.towers.config))
    untrained, _ = validation_ndcg(TowersScorer(blank), leave_one_out(others).validation, 24)
    assert ready.metrics["ndcg@10"] > untrained + 0.05
    fine = train(unseen, others, replace(CONFIG, pretrain_epochs=0), directory=tmp_path / "fine", start=start)
    assert fine.curves[0].loss < train(
        unseen, others, replace(CONFIG, pretrain_epochs=0), directory=tmp_path / "scratch"
    ).curves[0].loss  # fmt: skip
    alone = Catalogue(unseen.item_ids, {"text": unseen.content["text"]}, {"text": unseen.present["text"]})
    _, told = read_start(tmp_path, alone, {"text": "t1"})
    assert told == ["no item has attributes, which the model has learned from"]
    more = Catalogue(
        unseen.item_ids,
        {**unseen.content, "image": np.ones((24, 5), np.float32)},
        {**unseen.present, "image": np.ones(24, np.bool_)},
    )
    start, told = read_start(tmp_path, more, {**ENCODERS, "image": "i1"})
    assert told == ["image is left out: the model has not learned from it"]
    assert start[0].config.modalities == seen.modalities


def test_it_starts_where_items_are_their_features_and_users_the_mean_of_theirs() -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    shape = replace(SHAPE, dim=32, modalities=catalogue.modalities)
    found = {}
    for initial in ("identity", "normal"):
        torch.manual_seed(0)
        model = initial_encoder(catalogue, histories, replace(CONFIG, towers=shape, initial=initial)).eval()  # type: ignore[arg-type]
        items = model.item_embeddings()
        content, present = model.content_of(torch.arange(len(catalogue)))
        both = items.has_content & present["text"] & present["attributes"]
        text = content["text"][both]
        pairs = torch.corrcoef(
            torch.stack([(items.item[both] @ items.item[both].T).flatten(), (text @ text.T).flatten()])
        )
        found[initial] = (
            float(pairs[0, 1]),
            validation_ndcg(TowersScorer(model), leave_one_out(histories).validation, 30)[0],
        )
    assert found["identity"][0] > 0.9
    assert found["identity"][1] > found["normal"][1] + 0.05


@pytest.mark.parametrize(
    ("encoders", "told"),
    [
        ({"text": "t2", "attributes": "a1"}, "learned from text by the encoder revision t1; this catalogue's is t2"),
        ({"image": "i1"}, "reads attributes, text; this catalogue has image"),
    ],
)
def test_a_start_by_other_encoders_is_refused(tmp_path: Path, encoders: dict[str, str], told: str) -> None:
    catalogue = tiny_catalogue()
    checkpoint.save(tmp_path, model_of(catalogue), CONFIG, catalogue)
    checkpoint.write_json(tmp_path / SUMMARY, {"encoders": ENCODERS})
    with pytest.raises(UserError, match=told):
        read_start(tmp_path, catalogue, encoders)


def test_a_start_of_another_shape_or_width_is_refused(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    wide = model_of(catalogue, dim=32, blocks=1)
    with pytest.raises(UserError, match="another shape: its dim is 32, not 16; its blocks is 1, not 2"):
        train(catalogue, histories, CONFIG, directory=tmp_path, start=(wide, catalogue.item_ids))
    narrow = Catalogue(
        catalogue.item_ids, {**catalogue.content, "text": catalogue.content["text"][:, :9]}, catalogue.present
    )
    with pytest.raises(UserError, match="reads text of width 12, the catalogue's has 9"):
        train(narrow, histories, CONFIG, directory=tmp_path, start=(wide, catalogue.item_ids))
    checkpoint.save(tmp_path, model_of(catalogue), CONFIG, catalogue)
    with pytest.raises(UserError, match="reads text of width 12, the catalogue's has 9"):
        checkpoint.load(tmp_path, narrow)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 0, "pretrain_epochs": 0}, "epochs=0 serves what training starts from"),
        ({"initial": "svd"}, r"mmsrec knows no other value of initial \(identity, normal\)"),
        ({"towers": TowersConfig(), "initial": "identity", "pretrain_epochs": 0}, "start from svd or normal"),
        ({"table_optimiser": "rowwise"}, r"mmsrec knows no other value of table_optimiser \(dense\)"),
        ({"towers": replace(SHAPE, interests=2)}, r"mmsrec knows no other value of towers.interests \(1\)"),
        ({"towers": TowersConfig(interests=1)}, "pretrain_epochs is for mmsrec; towers start from co-occurrence"),
        ({"towers": replace(SHAPE, family="none")}, "no family 'none'; there are towers, mmsrec"),
    ],
)
def test_options_that_it_cannot_have_are_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        train(tiny_catalogue(), tiny_histories(), replace(CONFIG, **change), directory=tmp_path)  # type: ignore[arg-type]


def test_it_needs_content(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="built on the items' content, and no item has any"):
        train(tiny_catalogue(content=False), tiny_histories(), CONFIG, directory=tmp_path)
    silent = tiny_catalogue()
    nothing = Catalogue(silent.item_ids, {"text": np.zeros((30, 4), np.float32)}, {"text": np.zeros(30, np.bool_)})
    with pytest.raises(UserError, match=r"no item has content|no history holds two events of items with content"):
        train(nothing, tiny_histories(), replace(CONFIG, pretrain_epochs=0), directory=tmp_path)


def test_the_preset_is_of_this_family() -> None:
    assert preset("mmsrec").towers.family == "mmsrec"
    assert preset("mmsrec").pretrain_epochs > 0
