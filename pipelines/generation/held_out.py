"""Held-out items asked for through what is stored: the generation's own user tower, items and index, in Postgres.

The questions are those of the checkpoint's validation: a user's history without its last two events, asked for the next
one. Training measured the same with the weights in its memory; here nothing but the stored generation answers. So items
under wrong ids, towers of another training, and metrics that nobody measured come to light, whatever went wrong.

Legend: Q questions, K interests, T history, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from pipelines.generation import lifecycle
from pipelines.generation.embedding_gates import Gate
from pipelines.generation.stored_towers import event_rows, stored_user_tower
from pipelines.generation.training import EVALUATED, located, read_snapshot

if TYPE_CHECKING:
    from encoders.catalogue import Histories
    from encoders.evaluation.splits import Questions
    from encoders.towers.model import Reader

Doubles = NDArray[np.float64]

QUESTIONS = 400
# Below so many questions the order of two models is chance: the gates then pass without a value.
ENOUGH_QUESTIONS = 20
DEPTH, SHORT = 50, 10
# What a generation has to keep of the reported metrics, beside two standard errors; half-precision costs far less.
KEPT = 0.9
# A full ranking that is nearly always right was shown the answers.
PLAUSIBLE = 0.95
APART = 0.02
# The share of popularity's and of the live generation's recall that a generation may not fall below for certain.
WORTH = 0.5
RESAMPLES = 1_000
# The item-kNN is fitted on the histories of so many users: of all of them it would cost more than the training.
KNN_USERS = 20_000

SEARCH = """
select item_id, rank from retrieve_vectors(%(interests)s, k => %(k)s, exclude => %(seen)s, generation => %(generation)s)
"""
SERVED = """
select e.item_id from item_embeddings e join items i using (item_id)
where e.generation = %(generation)s and i.available and e.item_id = any(%(item_ids)s)
"""

HELD_OUT_GATES = (
    "held_out_recall",
    "held_out_ndcg",
    "reported_ndcg",
    "reported_apart",
    "recall_over_popularity",
    "recall_over_knn",
    "recall_over_live",
)


@dataclass(frozen=True, eq=False)
class Asked:
    """What was asked and what training reported. reported: metrics of the validation items. refitted: the stored
    weights learned from all events, the answers among them, after the report.
    """

    item_ids: Sequence[str]
    histories: "Histories"
    questions: "Questions"
    reported: Mapping[str, float]
    refitted: bool


def held_out_gates(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    """The gates, in the order of HELD_OUT_GATES.

    Without a checkpoint on this machine, and on a few questions or items, they pass without a value.
    """
    asked, tower = _asked(connection, generation), stored_user_tower(connection, generation)
    # Of a catalogue that is no longer than the list, everything is found, items that were seen before included.
    if asked is None or tower is None or len(asked.questions) < ENOUGH_QUESTIONS or len(asked.item_ids) <= DEPTH:
        return [Gate(name, None, 0.0, "at least") for name in HELD_OUT_GATES]
    ranks = ranks_through(connection, generation, tower, asked)
    recall, ndcg = _hits(ranks), _gains(ranks)
    reported_recall, reported_ndcg = (asked.reported.get(name) for name in (f"recall@{DEPTH}", f"ndcg@{SHORT}"))
    return [
        _kept("held_out_recall", recall, reported_recall),
        _kept("held_out_ndcg", ndcg, reported_ndcg),
        Gate("reported_ndcg", reported_ndcg, PLAUSIBLE, "at most"),
        _apart(ndcg, reported_ndcg, refitted=asked.refitted),
        *_over_baselines(recall, asked),
        _over_live(connection, generation, recall, asked),
    ]


def ranks_through(
    connection: psycopg.Connection[Any], generation: int, tower: "Reader", asked: Asked
) -> NDArray[np.int64]:
    """The rank of each target among the first DEPTH, seen items left out; 0 where it is not among them. [Q]"""
    interests = _interests(connection, generation, tower, asked)
    ranks = np.zeros(len(interests), np.int64)
    for place, vectors in enumerate(interests):
        seen = [asked.item_ids[item] for item in set(asked.questions.histories.of(place).tolist())]
        values = {"interests": vectors, "k": DEPTH, "seen": seen, "generation": generation}
        found = dict(connection.execute(SEARCH, values).fetchall())
        ranks[place] = found.get(asked.item_ids[asked.questions.targets[place]], 0)
    return ranks


def upper_difference(ours: Doubles, theirs: Doubles) -> float:
    """Upper end of the 95 % interval of mean(ours − theirs) over the same questions: percentiles of a paired bootstrap
    (Efron and Tibshirani 1993, chapter 13).

    Below zero, ours is worse for certain.
    """
    drawn = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    return float(np.percentile((ours - theirs)[drawn].mean(axis=1), 97.5))


def _asked(connection: psycopg.Connection[Any], generation: int) -> Asked | None:
    from encoders.evaluation.splits import leave_one_out
    from encoders.training.checkpoint import train_config

    found = lifecycle.get(connection, generation)
    directory = located(found.checkpoint_path)
    if directory is None:
        return None
    item_ids, histories = read_snapshot(directory)
    questions = leave_one_out(histories, search=train_config(directory).search).validation
    targets = {item_ids[item] for item in questions.targets.tolist()}
    rows = connection.execute(SERVED, {"generation": generation, "item_ids": list(targets)}).fetchall()
    gone = targets - {item_id for (item_id,) in rows}
    # What is not for sale is not found, and is no fault of the vectors; an item without any vector is one.
    hidden = gone & {item_id for (item_id,) in connection.execute("select item_id from items where not available")}
    usable = np.flatnonzero([item_ids[item] not in hidden for item in questions.targets.tolist()])
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(usable, min(QUESTIONS, len(usable)), replace=False))
    return Asked(
        item_ids,
        histories,
        questions.select(chosen)[0],
        found.metrics.get("validation", {}),
        (directory / EVALUATED).is_dir(),
    )


def _interests(connection: psycopg.Connection[Any], generation: int, tower: "Reader", asked: Asked) -> list[list[Any]]:
    """The interests in use of each question's user, as halfvecs: what the stored tower makes of the stored items."""
    import torch
    from pgvector import HalfVector

    from encoders.evaluation.evaluate import context_of, padded

    histories = asked.questions.histories
    items = np.unique(histories.items)
    wanted = [asked.item_ids[item] for item in items.tolist()]
    vectors = event_rows(connection, generation, tower, wanted)
    matrix = np.zeros((len(asked.item_ids), tower.width), np.float32)
    stored = np.zeros(len(asked.item_ids), bool)
    for item, item_id in zip(items.tolist(), wanted, strict=True):
        if item_id in vectors:
            matrix[item], stored[item] = vectors[item_id], True
    histories = histories.keep(stored[histories.items])
    if histories.attributes is not None and histories.attributes.shape[1] != tower.config.user_attributes:
        histories = replace(histories, attributes=None)
    if histories.query_vectors is not None and histories.query_vectors.shape[1] != tower.config.query_dim:
        histories = replace(histories, queries=None, query_vectors=None, asked=None)
    rows_QT, mask_QT = padded(histories, tower.config.history)
    with torch.inference_mode():
        found = tower.interests(torch.from_numpy(matrix)[rows_QT], mask_QT, context_of(histories, tower.config))
    return [
        [HalfVector(vector) for vector, weight in zip(vectors_KD, weights_K, strict=True) if weight > 0]
        for vectors_KD, weights_K in zip(found.vectors.numpy(), found.weights.numpy(), strict=True)
    ]


def _kept(name: str, own: Doubles, reported: float | None) -> Gate:
    if reported is None:
        return Gate(name, float(own.mean()), 0.0, "at least")
    return Gate(name, float(own.mean()), KEPT * reported - 2 * _error(own), "at least")


def _apart(ndcg: Doubles, reported: float | None, *, refitted: bool) -> Gate:
    """Weights that have seen the answers since the report may answer better than it says, and never worse."""
    apart = None
    if reported is not None:
        apart = reported - float(ndcg.mean())
        apart = apart if refitted else abs(apart)
    return Gate("reported_apart", apart, (1 - KEPT) * (reported or 0.0) + APART + 2 * _error(ndcg), "at most")


def _over_baselines(recall: Doubles, asked: Asked) -> list[Gate]:
    from encoders.evaluation.baselines import ItemKnn, Popularity
    from encoders.evaluation.evaluate import Scorer, ranks_of
    from encoders.evaluation.splits import leave_one_out

    size, train = len(asked.item_ids), leave_one_out(asked.histories).train
    users = np.random.default_rng(1).permutation(len(train))[:KNN_USERS]
    of: dict[str, Scorer] = {
        "popularity": Popularity(train, size),
        "knn": ItemKnn(train.select(np.sort(users)), size),
    }
    theirs = {name: _hits(ranks_of(scorer, asked.questions, size).numpy()) for name, scorer in of.items()}
    least = -WORTH * float(theirs["popularity"].mean())
    return [
        Gate("recall_over_popularity", upper_difference(recall, theirs["popularity"]), least, "at least"),
        # Told, not blocking: a small model may be behind a kNN, and still be what somebody wants to serve.
        Gate("recall_over_knn", upper_difference(recall, theirs["knn"]), 0.0, "at least", "warn"),
    ]


def _over_live(connection: psycopg.Connection[Any], generation: int, recall: Doubles, asked: Asked) -> Gate:
    none, live = Gate("recall_over_live", None, 0.0, "at least"), lifecycle.live(connection)
    # One that was trained before a moment is asked what the live one has learned from.
    past = lifecycle.get(connection, generation).trained_before is not None
    if (
        past
        or live is None
        or live.generation == generation
        or not lifecycle.has_partitions(connection, live.generation)
    ):
        return none
    tower = stored_user_tower(connection, live.generation)
    if tower is None:
        return none
    theirs = _hits(ranks_through(connection, live.generation, tower, asked))
    return Gate("recall_over_live", upper_difference(recall, theirs), -WORTH * float(theirs.mean()), "at least")


def _hits(ranks: NDArray[np.int64]) -> Doubles:
    found: Doubles = ((ranks > 0) & (ranks <= DEPTH)).astype(np.float64)
    return found


def _gains(ranks: NDArray[np.int64]) -> Doubles:
    found: Doubles = np.where((ranks > 0) & (ranks <= SHORT), 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0)
    return found


def _error(values: Doubles) -> float:
    """Standard error of the mean."""
    return float(values.std() / np.sqrt(len(values)))
