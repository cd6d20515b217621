"""Search over a long history: codes against exact products, LSH, residual codes and HNSW, in the same run.

`make bench-codes DATA=…/hm-fashion [IMAGES=DIR] [CACHE=DIR]`, or `python -m benchmarks.codes DATA --images DIR`: the
embeddings of a real catalogue (text, attributes, pictures, and SEMINAR's fourth modality, the ID: rows of the PPMI-SVD
of behaviour), histories of T of its items, the 32 that are most like a candidate. CPU time of one thread; every search
finds another user's history, so that none of them is in the processor's caches. Writes results/codes.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np

from encoders.codes.codec import codebooks, coded, train_codec
from encoders.codes.history import Codebooks, Coded, best, look_up, search
from encoders.codes.quantise import train_residual

RESULTS = Path(__file__).parent / "results" / "codes.json"
D, K, DEEP = 64, 32, 128  # width of vectors; events asked for, and re-ranked
USERS, SEARCHES, TOGETHER = 16, 96, 100
INNER, EIGHT_BITS = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_8bit
PAPER, FOLDED = "exact, all pairs of modalities (the paper's)", "exact, folded to one vector"


@dataclass(frozen=True, eq=False)
class World:
    """placed: float32 [V, M, D], zero where absent; folded: [V, D]; items: their codes."""

    placed: np.ndarray
    folded: np.ndarray
    shares: np.ndarray
    items: Coded
    books: Codebooks


@dataclass(frozen=True)
class Contestant:
    """bytes: an item of a history, in memory. hold: a history's items → what is kept. find: that and a candidate → the
    K best places. together: the same for many candidates, where there is a quicker way than one after the other.
    users: fewer where holding a history takes long."""

    bytes: float
    hold: Callable[[np.ndarray], Any]
    find: Callable[[Any, int], np.ndarray]
    together: Callable[[Any, np.ndarray], Any] | None = None
    users: int = USERS


# By name: what makes one of the world. Only those that are asked for are trained.
CONTESTANTS: dict[str, Callable[["World"], "Contestant"]] = {
    PAPER: lambda world: _paper(world),
    FOLDED: lambda world: _exact(world),
    "folded, 8-bit scalars": lambda world: _flat(world, faiss.IndexScalarQuantizer(D, EIGHT_BITS, INNER), D),
    "codes, decoded and folded": lambda world: _decoded(world),
    "codes, look-ups in numpy": lambda world: _looked_up(world),
    "codes, look-ups in faiss": lambda world: _codes(world, 8),
    "codes, look-ups in faiss, the best 128 re-ranked": lambda world: _codes(world, 8, rerank=True),
    "4-bit codes (fast scan)": lambda world: _codes(world, 4),
    "4-bit codes (fast scan), the best 128 re-ranked": lambda world: _codes(world, 4, rerank=True),
    "4-bit codes of the folded vector, the best 128 re-ranked": lambda world: _folded_codes(world),
    "LSH, 512 bits": lambda world: _flat(world, faiss.IndexLSH(D, 512), 64),
    "residual codes, 4 levels (semantic IDs)": lambda world: _residual(world, 4),
    "residual codes, 16 levels": lambda world: _residual(world, 16),
    "HNSW for each modality": lambda world: _graphs(world),
}


def top(scores: np.ndarray) -> np.ndarray:
    """Places of the K highest, the highest first."""
    places = np.argpartition(scores, -K)[-K:]
    return places[np.argsort(-scores[places])]


def _exact(world: World) -> Contestant:
    return Contestant(
        4 * D,
        lambda rows: world.folded[rows],
        lambda held, item: top(held @ world.folded[item]),
        lambda held, items: best(world.folded[items] @ held.T, K),
    )


def _decoded(world: World) -> Contestant:
    """Σ_n w_n C_n[code] of every event, once for all candidates, and a product with each."""
    return Contestant(
        world.items.codes[0].size,
        world.items.take,
        lambda held, item: search(world.books, world.items.take(np.array([item])), held, K)[0][0],
        lambda held, items: search(world.books, world.items.take(items), held, K),
    )


def _looked_up(world: World) -> Contestant:
    return Contestant(
        world.items.codes[0].size,
        world.items.take,
        lambda held, item: top(look_up(world.books, world.items.take(np.array([item])), held)),
    )


def _paper(world: World) -> Contestant:
    """Σ_mn w_m w_n q_m·k_n, one product for each pair of modalities."""
    _, modalities, width = world.placed.shape
    weighed = world.placed * world.shares[..., None]

    def find(held: Sequence[np.ndarray], item: int) -> np.ndarray:
        return top(sum(keys @ query for query in weighed[item] for keys in held))

    def hold(rows: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(keys) for keys in weighed[rows].transpose(1, 0, 2)]

    return Contestant(4 * width * modalities, hold, find)


def _flat(world: World, index: Any, size: float) -> Contestant:
    """A faiss index over folded vectors, trained on the catalogue."""
    index.train(world.folded)

    def hold(rows: np.ndarray) -> Any:
        copy = faiss.clone_index(index)
        copy.add(world.folded[rows])
        return copy

    return Contestant(
        size, hold, lambda held, item: held.search(world.folded[item : item + 1], K)[1][0],
        lambda held, items: held.search(world.folded[items], K),
    )  # fmt: skip


def _codes(world: World, bits: int, *, rerank: bool = False) -> Contestant:
    """The codes of all modalities side by side: one look-up each, in faiss. Queries are folded, and as decoded."""
    _, modalities, width = world.placed.shape
    weighed = (world.placed * world.shares[..., None] * modalities).reshape(len(world.placed), -1)
    index = _quantiser(modalities * width, 16 * modalities, bits)
    index.train(weighed)
    queries = np.tile(world.folded if rerank else world.books.fold(world.items), modalities)
    return _scanned(world, index, weighed, queries, 16 * modalities, rerank=rerank)


def _folded_codes(world: World) -> Contestant:
    """16 bytes an item for the folded vector, whatever the number of modalities: weights can no longer change."""
    index = _quantiser(world.folded.shape[1], 16, 4)
    index.train(world.folded)
    return _scanned(world, index, world.folded, world.folded, 16, rerank=True)


def _quantiser(width: int, size: int, bits: int) -> Any:
    if bits == 4:
        return faiss.IndexPQFastScan(width, 2 * size, 4, INNER)
    return faiss.IndexPQ(width, size, 8, INNER)


def _scanned(
    world: World, index: Any, keys: np.ndarray, queries: np.ndarray, size: float, *, rerank: bool
) -> Contestant:
    def hold(rows: np.ndarray) -> Any:
        copy = faiss.clone_index(index)
        copy.add(np.ascontiguousarray(keys[rows]))
        return copy, rows

    def find(held: Any, item: int) -> np.ndarray:
        scanned, rows = held
        if not rerank:
            return scanned.search(queries[item : item + 1], K)[1][0]
        places = scanned.search(queries[item : item + 1], DEEP)[1][0]
        return places[top(world.folded[rows[places]] @ world.folded[item])]

    def together(held: Any, items: np.ndarray) -> Any:
        scanned, rows = held
        places = scanned.search(queries[items], DEEP if rerank else K)[1]
        return (
            [top(world.folded[rows[p]] @ world.folded[i]) for p, i in zip(places, items, strict=True)]
            if rerank
            else places
        )

    return Contestant(size, hold, find, together)  # fmt: skip


def _residual(world: World, levels: int) -> Contestant:
    quantiser = train_residual(world.folded, levels)
    codes = quantiser.encode(world.folded).astype(np.int32) + 256 * np.arange(levels, dtype=np.int32)
    centroids = quantiser.centroids.reshape(-1, world.folded.shape[1])

    def find(held: np.ndarray, item: int) -> np.ndarray:
        return top((centroids @ world.folded[item]).take(held).sum(axis=1))

    return Contestant(levels, lambda rows: codes[rows], find)


def _graphs(world: World) -> Contestant:
    """Each modality searched by the folded query, the union ranked exactly. Building is not counted."""
    _, modalities, width = world.placed.shape

    def hold(rows: np.ndarray) -> Any:
        found = []
        for keys in world.placed[rows].transpose(1, 0, 2):
            index = faiss.IndexHNSWFlat(width, 16, INNER)
            index.hnsw.efSearch = DEEP
            index.add(np.ascontiguousarray(keys))
            found.append(index)
        return found, rows

    def find(held: Any, item: int) -> np.ndarray:
        graphs, rows = held
        query = world.folded[item : item + 1]
        places = np.unique(np.concatenate([graph.search(query, DEEP)[1][0] for graph in graphs]))
        places = places[places >= 0]
        return places[top(world.folded[rows[places]] @ query[0])]

    return Contestant(modalities * (4 * width + 4 * 2 * 16), hold, find, users=2)


def measure(world: World, contestant: Contestant, length: int) -> dict[str, float]:
    """Recall of the exact best K, CPU microseconds a search (alone, of many together), bytes."""
    random = np.random.default_rng(length)
    histories = [random.choice(len(world.folded), length, replace=length > len(world.folded)) for _ in range(USERS)]
    histories = histories[: contestant.users]
    held = [contestant.hold(rows) for rows in histories]
    recalls, seconds = [], []
    for turn, item in enumerate(random.integers(len(world.folded), size=SEARCHES).tolist()):
        exact = world.folded[histories[turn % len(histories)]] @ world.folded[item]
        started = thread_time()
        places = contestant.find(held[turn % len(histories)], item)
        seconds.append(thread_time() - started)
        bound = np.partition(exact, -K)[-K] - 1e-6
        recalls.append(float((exact[places] >= bound).sum()) / K)
    return {
        "recall": round(float(np.mean(recalls)), 4),
        "error": round(float(np.std(recalls) / np.sqrt(SEARCHES)), 4),
        "microseconds": round(median(seconds) * 1e6, 1),
        "together": round(_together(contestant, held, random, len(world.folded)), 1),
        "bytes": contestant.bytes,
    }


def _together(contestant: Contestant, held: Sequence[Any], random: np.random.Generator, size: int) -> float:
    """CPU microseconds a candidate, where a hundred are asked about one history."""
    seconds = []
    for history in held[:8]:
        items = random.integers(size, size=TOGETHER)
        started = thread_time()
        if contestant.together is None:
            for item in items.tolist():
                contestant.find(history, item)
        else:
            contestant.together(history, items)
        seconds.append((thread_time() - started) / TOGETHER)
    return median(seconds) * 1e6


def read(data: Path, images: Path | None, cache: Path | None) -> tuple[World, list[str], dict[str, float]]:
    """The catalogue's items that have content, placed and coded; names of the modalities; what coding keeps of each."""
    from encoders.cooccurrence import ppmi_vectors
    from encoders.experiments.experiment import encoded_catalogue
    from pipelines.load.dataset import read_folder

    dataset, _ = read_folder(data)
    names = sorted({"text", "attributes", *(["image"] if images else [])})
    catalogue = encoded_catalogue(dataset, names, images=images, cache=cache)
    rows = ppmi_vectors(dataset.histories, len(catalogue), 64, seed=0)
    names = sorted([*names, "id"])
    content = {**catalogue.content, "id": rows / np.linalg.norm(rows, axis=1, keepdims=True)}
    present = {**catalogue.present, "id": dataset.histories.counts(len(catalogue)) > 0}
    codec = train_codec(content, present)
    encoded = codec.encode(content, present)
    items = coded(encoded.codes, present)
    books = codebooks({name: quantiser.centroids for name, quantiser in codec.quantisers.items()}, codec.weights)
    placed = np.stack([codec.placings[name](content[name]) for name in names], 1) * items.present[..., None]
    shares = books.shares(items.present)
    folded = np.ascontiguousarray(np.einsum("vm,vmd->vd", shares, placed), np.float32)
    kept = {name: round(float(cosines.mean()), 4) for name, cosines in encoded.cosines.items()}
    return World(placed.astype(np.float32), folded, shares, items, books), names, kept


def main() -> None:
    """Measures histories of 2,048 and 10,000 items, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=os.environ.get("DATA"))
    parser.add_argument("--images", type=Path, default=os.environ.get("IMAGES"))
    parser.add_argument("--cache", type=Path, default=os.environ.get("CACHE"), help="where encoded content is kept")
    parser.add_argument("--only", default="", help="designs whose name begins so; the others keep their figures")
    given = parser.parse_args()
    if given.data is None or not Path(given.data).is_dir():
        print(f"skipped: benchmarks.codes needs DATA, a folder of real items; {given.data} is none", file=sys.stderr)
        return
    faiss.omp_set_num_threads(1)
    data, images, cache = (None if path is None else Path(path) for path in (given.data, given.images, given.cache))
    assert data is not None
    world, names, kept = read(data, images, cache)
    document = json.loads(RESULTS.read_text()) if given.only and RESULTS.is_file() else {}
    document |= {"data": data.name, "items": len(world.folded), "modalities": names, "cosine": kept}
    for name in (name for name in CONTESTANTS if name.startswith(given.only)):
        contestant = CONTESTANTS[name](world)
        for length in (2_048, 10_000):
            found = measure(world, contestant, length)
            print(f"{length:6} {name:58} {found}", file=sys.stderr, flush=True)
            document.setdefault("lengths", {}).setdefault(str(length), {})[name] = found
            RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
