"""(query, item) pairs: what the towers read of queries, what they do not, and SEMINAR's three losses by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.catalogue import Histories
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluation.evaluate import context_of, padded
from encoders.evaluation.splits import leave_one_out, searches
from encoders.towers.pairs import Pairs
from encoders.towers.towers import Context, Towers
from encoders.training import search_unit
from encoders.training.packing import batches, pack
from encoders.training.train import train
from polytower.errors import UserError
from tests.encoders.data import ITEMS, histories_of, tiny_catalogue, tiny_histories

WIDTH = 6
TOWERS = TowersConfig(dim=16, heads=2, history=8, dropout=0.1, interests=1, content_width=16, pair="gated",
                      shrinkage=1.0)  # fmt: skip
CONFIG = TrainConfig(preset="test", towers=TOWERS, epochs=3, unit_epochs=2, negatives=0, batch_rows=8, threads=1,
                     device="cpu", learning_rate=1e-2, search=True)  # fmt: skip
CPU = torch.device("cpu")


def asking(histories: Histories, seed: int = 0, silent: float = 0.3) -> Histories:
    """The histories with queries: a vector of its own for each item, and nothing at some events."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = np.where(rng.random(len(histories.items)) < silent, -1, histories.items)
    return replace(histories, queries=queries, query_vectors=vectors)


def paired(pair: str = "mean") -> Pairs:
    torch.manual_seed(0)
    return Pairs(replace(TOWERS, pair=pair, query_dim=WIDTH)).eval()


@pytest.mark.parametrize("pair", ["mean", "gated"])
def test_a_pair_starts_as_the_mean_and_is_the_item_without_a_query(pair: str) -> None:
    pairs = paired(pair)
    texts, items = torch.randn(2, 3, WIDTH), torch.randn(2, 3, 16)
    texts[0, 1] = 0
    found = pairs(texts, items)
    assert torch.equal(found[0, 1], items[0, 1])
    assert torch.allclose(found[1], 0.5 * pairs.queries(texts)[1] + 0.5 * items[1])
    assert torch.allclose(pairs.queries(texts).norm(dim=-1), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))


def test_a_question_without_a_text_is_untouched_and_one_with_it_is_as_loud() -> None:
    pairs = paired()
    states = torch.randn(2, 1, 16) * 7
    texts = torch.stack([torch.zeros(1, WIDTH), torch.randn(1, WIDTH)])
    found = pairs.ask(texts, states)
    assert torch.allclose(found[0], states[0], atol=1e-5)
    loud = states[1].norm()
    assert torch.allclose(found[1], (0.5 * pairs.queries(texts)[1] + 0.5 * states[1] / loud) * loud, atol=1e-5)


def test_the_next_pair_by_hand() -> None:
    """Two positions, each the other's sampled pair: softplus(−s⁺/τ) + softplus(s⁻/τ)."""
    states = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]]])
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    own = (softplus(-1.0 / 0.5) + softplus(-0.8 / 0.5)) / 2
    others = (softplus(0.0 / 0.5) + softplus(0.6 / 0.5)) / 2
    assert float(search_unit.next_pair_loss(states, pairs, 0.5)) == pytest.approx(own + others, abs=1e-5)
    better = float(search_unit.next_pair_loss(pairs[:, None], pairs, 0.5))
    assert better < own + others, "a state that is its next pair costs less"


def test_relevance_by_hand_and_with_the_right_sign() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    taken = torch.tensor([[0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]])
    items, asks = torch.tensor([7, 8, 9, 7]), torch.tensor([True, False, False, False])
    others = torch.tensor([[1, 2, 3]])  # the last took the very item, and does not count
    found = search_unit.relevance_loss(queries, taken, items, asks, others, 0.5)
    share = math.exp(0.8 / 0.5) / (math.exp(0.8 / 0.5) + math.exp(0.0) + math.exp(-1.0 / 0.5))
    assert float(found) == pytest.approx(-math.log(share), abs=1e-6)
    assert float(found) > 0
    nearer = torch.tensor([[1.0, 0.0], *taken[1:].tolist()])
    assert float(search_unit.relevance_loss(queries, nearer, items, asks, others, 0.5)) < float(found)


def test_alignment_by_hand() -> None:
    """Two views of three items, of which the last lacks the second: rows and columns of a 2 × 2 softmax."""
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[0.8, 0.6], [0.6, 0.8], [0.0, 0.0]]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    share = math.exp(0.8) / (math.exp(0.8) + math.exp(0.6))
    assert float(search_unit.alignment_loss(views, present, 1.0)) == pytest.approx(-math.log(share), abs=1e-6)
    assert float(search_unit.alignment_loss(views, present & False, 1.0)) == 0


def test_negatives_are_of_the_same_sequence_and_other_items() -> None:
    histories = asking(histories_of({"a": [0, 1, 2, 3, 1], "b": [10, 11, 12], "c": [20]}))
    rows = pack(histories, 8, np.random.default_rng(0), starts=True)
    (batch,) = batches(rows, 8, CPU)
    drawn = batch.targets[search_unit.sequence_negatives(batch, 2)].tolist()
    for target, others in zip(batch.targets.tolist(), drawn, strict=True):
        if target in (1, 2, 3):  # two other items at least in its window
            assert set(others) <= {1, 2, 3} - {target}
        elif target in (11, 12):  # one other item; the rest of the step fills up
            assert others[0] == 23 - target
        assert len(others) == 2


@pytest.mark.parametrize("silent", [0.0, 1.0])
def test_positions_are_told_the_query_of_their_target_alone(silent: float) -> None:
    histories = asking(tiny_histories())
    assert histories.queries is not None
    rows = pack(histories, 8, np.random.default_rng(0), starts=True, silent_queries=silent)
    assert rows.queries is not None
    assert rows.asked is not None
    valid = rows.segments > 0
    told = rows.asked[valid]
    assert ((told == -1) | (told == rows.targets[valid])).all()
    assert (told >= 0).any() == (silent == 0)
    begun = valid & (rows.inputs >= 0)
    assert ((rows.queries[begun] == -1) | (rows.queries[begun] == rows.inputs[begun])).all()
    assert (rows.queries[valid & (rows.inputs < 0)] == -1).all()


def test_only_search_questions_are_told_the_query_of_their_target() -> None:
    histories = asking(tiny_histories(), silent=0.0)
    assert leave_one_out(histories).test.histories.asked is None
    told = leave_one_out(histories, search=True)
    for questions in (told.validation, told.test):
        assert questions.histories.asked is not None
        assert (questions.histories.asked == questions.targets).all()
    split = searches(histories, test=0.3, validation=0.3)
    for questions in (split.validation, split.test):
        assert questions.histories.asked is not None
        assert len(questions) > 5
        assert (questions.histories.asked == questions.targets).all()
    newest = split.train.times.max()
    for row, user in enumerate(split.test.histories.user_ids):
        before = split.test.histories.times[split.test.histories.offsets[row] : split.test.histories.offsets[row + 1]]
        assert len(before) == 0 or before.max() > newest or user in split.train.user_ids


def test_queries_of_the_history_and_of_the_question_change_the_interests_and_padding_does_not() -> None:
    histories = asking(tiny_histories())
    towers = Towers(replace(TOWERS, modalities=tiny_catalogue().modalities, query_dim=WIDTH), tiny_catalogue()).eval()
    items = towers.item_embeddings().item
    rows, mask = padded(histories, TOWERS.history)
    context = context_of(histories, towers.config)
    plain = towers.user_interests(items[rows], mask).vectors
    read = towers.user_interests(items[rows], mask, context).vectors
    assert not torch.allclose(plain, read)
    nothing = Context(queries=torch.zeros_like(context.queries), asked=torch.zeros(len(rows), 1, WIDTH))  # type: ignore[arg-type]
    assert torch.allclose(towers.user_interests(items[rows], mask, nothing).vectors, plain, atol=1e-6)
    assert context.queries is not None
    garbage = context._replace(queries=torch.where(mask[..., None], context.queries, 9.0))
    assert torch.allclose(towers.user_interests(items[rows], mask, garbage).vectors, read, atol=1e-6)


def test_of_a_history_beyond_the_cap_the_newest_queries_count() -> None:
    long = asking(histories_of({"a": [item % ITEMS for item in range(60)]}), silent=0.0)
    towers = Towers(replace(TOWERS, modalities=tiny_catalogue().modalities, query_dim=WIDTH), tiny_catalogue()).eval()
    items = towers.item_embeddings().item
    assert long.query_vectors is not None
    whole = Context(queries=torch.from_numpy(long.query_vectors[long.queries])[None])
    all_of_it = towers.user_interests(
        items[torch.from_numpy(long.items)][None], torch.ones(1, 60, dtype=torch.bool), whole
    )
    rows, mask = padded(long, TOWERS.history)
    newest = towers.user_interests(items[rows], mask, context_of(long, towers.config))
    assert torch.allclose(all_of_it.vectors, newest.vectors, atol=1e-6)


def test_every_loss_reaches_what_it_should_and_no_other() -> None:
    catalogue, histories = tiny_catalogue(), asking(tiny_histories())
    rows = pack(histories, 8, np.random.default_rng(0), starts=True)
    (batch, *_) = batches(rows, 16, CPU)
    warm = torch.arange(ITEMS)
    reached = {}
    for name in ("unit_next", "unit_align", "unit_relevance"):
        torch.manual_seed(0)
        towers = Towers(replace(TOWERS, modalities=catalogue.modalities, query_dim=WIDTH), catalogue)
        off = dict.fromkeys(("unit_next", "unit_align", "unit_relevance"), 0.0)
        _, loss = search_unit.unit_loss(towers, batch, replace(CONFIG, **(off | {name: 1.0})), warm, warm)
        loss.backward()  # type: ignore[no-untyped-call]
        reached[name] = {
            part for part, value in towers.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0
        }
    queries, table, content = "user_tower.pairs.inner.weight", "item_tower.table", "item_tower.content.out.1.weight"
    assert {queries, table, content, "user_tower.backbone.scale"} <= reached["unit_next"]
    assert {table, content} <= reached["unit_align"]
    assert not any(part.startswith("user_tower") for part in reached["unit_align"])
    assert {queries, table} <= reached["unit_relevance"]
    assert "user_tower.backbone.scale" not in reached["unit_relevance"]


def test_training_starts_from_the_pretrained_tables_and_a_new_transformer() -> None:
    catalogue = tiny_catalogue()
    shape = replace(TOWERS, modalities=catalogue.modalities, query_dim=WIDTH)
    torch.manual_seed(1)
    pretrained, towers = Towers(shape, catalogue), Towers(shape, catalogue)
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    search_unit.restore(towers, (pretrained, catalogue.item_ids), catalogue)
    for name, value in towers.state_dict().items():
        restored = name.startswith(("item_tower.", "user_tower.pairs."))
        assert torch.equal(value, (pretrained.state_dict() if restored else before)[name]), name


def test_a_search_is_learned_and_a_killed_run_ends_the_same(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), asking(tiny_histories(users=80))
    whole = train(catalogue, histories, CONFIG, directory=tmp_path / "whole")
    assert whole.metrics["ndcg@10"] > 0.5, "the query names the item"

    class Killed(Exception):  # noqa: N818
        pass

    def kill(point: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(catalogue, histories, CONFIG, directory=tmp_path / "killed", on_epoch=kill)
    again = train(catalogue, histories, CONFIG, directory=tmp_path / "killed")
    for name, value in whole.towers.state_dict().items():
        assert torch.equal(value, again.towers.state_dict()[name]), name
    assert not (tmp_path / "killed" / "unit" / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit_epochs": -1}, "unit_epochs"),
        ({"unit_temperature": 0.0}, "unit_temperature"),
        ({"unit_negatives": 0}, "unit_negatives"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(CONFIG, **options)


def test_histories_with_queries_keep_them_in_every_cut() -> None:
    histories = asking(tiny_histories())
    assert histories.queries is not None
    kept = histories.keep(histories.items % 2 == 0)
    assert kept.queries is not None
    assert ((kept.queries == -1) | (kept.queries == kept.items)).all()
    chosen = histories.select(np.array([5, 3]))
    assert chosen.queries is not None
    assert ((chosen.queries == -1) | (chosen.queries == chosen.items)).all()
    assert histories.fingerprint("queries", "query_vectors") != asking(tiny_histories(), 1).fingerprint(
        "queries", "query_vectors"
    )
    with pytest.raises(ValueError, match="queries without vectors"):
        Histories(["a"], np.array([0, 1]), np.array([1]), np.array([1]), queries=np.array([0]))
