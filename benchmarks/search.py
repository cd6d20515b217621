"""The next click given what was typed: SEMINAR against what needs no training, by time, queries never seen apart.

    python -m benchmarks.search shared/data/bestbuy-xbox      # → benchmarks/results/search.json

Questions are the split `searches`: every event with a query in the newest tenth, its query told, its history before it.
All items are ranked, those seen too. Rivals in the same run: popularity of the items under the very query (normalised:
small letters, letters and digits), backed by popularity; BM25 over title, description and attributes; the same over
these and the training queries that led to the item; both mixed; the frozen text encoder's cosine of query and item; and
the towers themselves without the query. Differences are paired, with their standard errors.
"""

import argparse
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import Histories
from encoders.config import changed
from encoders.evaluation.baselines import Popularity, item_tokens
from encoders.evaluation.evaluate import Scorer, TowersScorer, rank
from encoders.evaluation.splits import Questions, searches
from encoders.experiments.experiment import Dataset, encoded_catalogue, with_queries
from encoders.presets import preset
from encoders.training import checkpoint
from encoders.training.train import train
from pipelines.load.dataset import read_folder

RESULTS = Path(__file__).parent / "results" / "search.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "seminar": {},
    "seminar, not pretrained": {"unit_epochs": 0},
    "seminar, pair mean": {"towers.pair": "mean"},
    "seminar, no L_next": {"unit_next": 0.0},
    "seminar, no L_align": {"unit_align": 0.0},
    "seminar, no L_qi": {"unit_relevance": 0.0},
}


def normalised(text: str) -> str:
    """Small letters, letters and digits alone: what two people who type the same thing have in common."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


class PerQuery:
    """Events of each item under the very query; popularity decides between equals and where the query is new."""

    def __init__(self, train: Histories, texts: Sequence[str], items: int) -> None:
        assert train.queries is not None
        self.keys = [normalised(text) for text in texts]
        self.popular = Popularity(train, items).counts / (1 + len(train.items))
        self.under: dict[str, Counter[int]] = {}
        for query, item in zip(train.queries.tolist(), train.items.tolist(), strict=True):
            if query >= 0:
                self.under.setdefault(self.keys[query], Counter())[item] += 1

    def __call__(self, histories: Histories) -> Tensor:
        assert histories.asked is not None
        scores = self.popular.repeat(len(histories), 1)
        for row, query in enumerate(histories.asked.tolist()):
            for item, count in self.under.get(self.keys[query], {}).items():
                scores[row, item] += count
        return scores


class Bm25:
    """Okapi BM25 of the query's words over the items' documents (k1 = 1.2, b = .75)."""

    def __init__(
        self, documents: Sequence[Sequence[str]], texts: Sequence[str], k1: float = 1.2, b: float = 0.75
    ) -> None:
        names: dict[str, int] = {}
        counts = [Counter(names.setdefault(token, len(names)) for token in tokens) for tokens in documents]
        table = np.zeros((len(documents), max(1, len(names))), np.float32)
        for row, found in enumerate(counts):
            table[row, list(found)] = list(found.values())
        lengths = table.sum(axis=1, keepdims=True)
        frequency = (table > 0).sum(axis=0)
        rarity = np.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        self.weights = torch.from_numpy(
            (rarity * table * (k1 + 1) / (table + k1 * (1 - b + b * lengths / lengths.mean()))).astype(np.float32)
        )
        self.words = [[names[word] for word in re.findall(r"\w+", text.lower()) if word in names] for text in texts]

    def __call__(self, histories: Histories) -> Tensor:
        assert histories.asked is not None
        return torch.stack([self.weights[:, self.words[query]].sum(dim=1) for query in histories.asked.tolist()])


class Frozen:
    """Cosine of the query's and the item's text, as they were encoded."""

    def __init__(self, items_VW: np.ndarray, queries_XW: np.ndarray) -> None:
        self.items, self.queries = torch.from_numpy(items_VW), torch.from_numpy(queries_XW)

    def __call__(self, histories: Histories) -> Tensor:
        assert histories.asked is not None
        return self.queries[torch.from_numpy(histories.asked)] @ self.items.T


class Mixed:
    """Two scorers, each divided by its best score for the question; the second one's weight is chosen on validation."""

    def __init__(self, one: Scorer, other: Scorer, validation: Questions, items: int) -> None:
        self.one, self.other, self.weight = one, other, 1.0
        found = {}
        for self.weight in (0.03, 0.1, 0.3, 1.0, 3.0):
            found[self.weight] = float((1 / rank(self, validation, items).ranks["unmasked"].double()).mean())
        self.weight = max(found, key=lambda weight: found[weight])

    def __call__(self, histories: Histories) -> Tensor:
        one, other = (scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-9)
                      for scores in (self.one(histories), self.other(histories)))  # fmt: skip
        return one + self.weight * other


class Unasked:
    """The towers without the text."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(self, histories: Histories) -> Tensor:
        return self.scorer(replace(histories, asked=None))


def rivals(data: Dataset, split: Any, histories: Histories, items_text: np.ndarray) -> dict[str, Scorer]:
    """What needs no training, fitted on the training part."""
    assert data.queries is not None
    assert split.train.queries is not None
    assert histories.query_vectors is not None
    texts, items = data.queries.texts, len(data.item_ids)
    documents = [item_tokens(row["title"], row["description"], row["attributes"]) for row in data.items]
    clicked: list[list[str]] = [list(document) for document in documents]
    for query, item in zip(split.train.queries.tolist(), split.train.items.tolist(), strict=True):
        if query >= 0:
            clicked[item] += re.findall(r"\w+", texts[query].lower())
    per_query, by_clicks = PerQuery(split.train, texts, items), Bm25(clicked, texts)
    return {
        "popularity": Popularity(split.train, items),
        "popularity per query": per_query,
        "BM25": Bm25(documents, texts),
        "BM25 of clicked queries": by_clicks,
        "popularity per query + BM25 of clicked queries": Mixed(per_query, by_clicks, split.validation, items),
        "frozen text encoder": Frozen(items_text, histories.query_vectors),
    }


def measures(ranks_N: Tensor) -> dict[str, float]:
    """R@1, R@5, MRR."""
    return {name: round(float(values.mean()), 4) for name, values in _values(ranks_N).items()}


def ahead(ours_N: Tensor, theirs_N: Tensor) -> dict[str, list[float]]:
    """By how much, with the standard error over the questions."""
    ours, theirs = _values(ours_N), _values(theirs_N)
    found = {}
    for name in ours:
        gap = ours[name] - theirs[name]
        found[name] = [round(float(gap.mean()), 4), round(float(gap.std() / len(gap) ** 0.5), 4)]
    return found


def _values(ranks_N: Tensor) -> dict[str, Tensor]:
    ranks = ranks_N.double()
    return {"R@1": (ranks <= 1).double(), "R@5": (ranks <= 5).double(), "MRR": 1 / ranks}


def main() -> None:
    """Trains the variants, ranks, and writes the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("data", type=Path)
    asked.add_argument("--seeds", type=int, default=1)
    asked.add_argument("--content", nargs="*", default=["text", "attributes"])
    asked.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    asked.add_argument("--into", type=Path, default=Path("build/search"), help="checkpoints, resumed from")
    given = asked.parse_args()
    data, _ = read_folder(given.data)
    assert data.queries is not None
    catalogue = encoded_catalogue(data, given.content, cache=given.into / "content")
    histories = with_queries(data, data.histories, cache=given.into / "content")
    split = searches(histories)
    items_text = encoded_catalogue(data, ["text"], cache=given.into / "content").content["text"]
    scorers: dict[str, Scorer] = dict(rivals(data, split, histories, items_text))
    for name in given.only:
        options = VARIANTS[name]
        for seed in range(given.seeds):
            config = changed(replace(preset("seminar"), seed=seed, device="cpu"), options)
            into = given.into / given.data.name / name.replace(" ", "_") / str(seed)
            if not (into / "towers.json").is_file():  # a finished one is not trained again
                train(catalogue, histories, config, directory=into, split=split, progress=True)
            towers, _, _ = checkpoint.load(into, catalogue)
            scorers[f"{name} {seed}"] = scorer = TowersScorer(towers)
            if name == "seminar":
                scorers[f"seminar, not told the query {seed}"] = Unasked(scorer)
    report = compared(data, split.train, split.test, scorers, len(catalogue))
    kept: Mapping[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    only = "" if set(given.only) == set(VARIANTS) else f" --only {shlex.join(given.only)}"
    command = f"python -m benchmarks.search {given.data.name} --seeds {given.seeds}{only}"
    RESULTS.write_text(json.dumps({**kept, data.name: {"command": command, **report}}, indent=1) + "\n")


def compared(
    data: Dataset, train: Histories, test: Questions, scorers: Mapping[str, Scorer], items: int
) -> dict[str, Any]:
    """The measures of every scorer by segment of the questions, and how far the first of the towers is ahead."""
    ours = next(name for name in scorers if name.startswith("seminar"))
    assert data.queries is not None
    assert train.queries is not None
    assert test.histories.asked is not None
    key: Callable[[int], str] = lambda query: normalised(data.queries.texts[query])  # type: ignore[union-attr]  # noqa: E731
    met = {key(query) for query in train.queries[train.queries >= 0].tolist()}
    seen = torch.tensor([key(query) in met for query in test.histories.asked.tolist()])
    known = torch.from_numpy(test.histories.lengths > 0)
    segments = {"all": torch.ones_like(seen), "query seen": seen, "query new": ~seen, "user with history": known}
    ranks = {name: rank(scorer, test, items).ranks["unmasked"] for name, scorer in scorers.items()}
    return {
        segment: {
            "questions": int(chosen.sum()),
            "measures": {name: measures(found[chosen]) for name, found in ranks.items()},
            f"{ours} ahead of": {name: ahead(ranks[ours][chosen], found[chosen]) for name, found in ranks.items()
                                 if name != ours},
        }
        for segment, chosen in segments.items()
    }  # fmt: skip


if __name__ == "__main__":
    main()
