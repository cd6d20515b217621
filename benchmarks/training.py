"""Training speed: packed rows and the fused softmax against a plain padded SASRec, cost by data size, interests rate.

    python -m benchmarks.training                     # synthetic, short histories → benchmarks/results/training.json
    python -m benchmarks.training --sizes 100000 1000000 10000000 --data ../shared/data/amazon-beauty

Everything is measured in the same process, one thread, same width, layers, negatives and data: positions (training
pairs) per second of one epoch for both; seconds per epoch for growing data with the log-log slope; users per second
of `TowersScorer.interests` beside the bare forward pass on the same, already padded batches.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.catalogue import Catalogue, Histories
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluate import TowersScorer, padded
from encoders.folder import read_interactions
from encoders.splits import production
from encoders.towers import Towers
from encoders.train import train

RESULTS = Path(__file__).parent / "results" / "training.json"
CONFIG = TrainConfig(towers=TowersConfig(interests=1), epochs=1, ema=0.99, threads=1, device="cpu", patience=99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--data", type=Path, help="contract folder for the speed table; synthetic if left out")
    parser.add_argument("--negatives", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(CONFIG, negatives=options.negatives)
    histories, items = folder(options.data) if options.data else synthetic(200_000)
    report: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "data": options.data.name if options.data else "synthetic",
        "interactions": len(histories.items),
        "packed_positions_per_second": round(packed_speed(histories, items, config)),
        "padded_positions_per_second": round(padded_speed(histories, items, config)),
    }
    report["times_faster"] = round(report["packed_positions_per_second"] / report["padded_positions_per_second"], 1)
    report["seconds_per_epoch"] = {size: round(epoch_seconds(size, config), 2) for size in options.sizes}
    report["log_log_slope"] = slope(report["seconds_per_epoch"])
    report["interests"] = interests_rate(histories, items, config)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def synthetic(interactions: int, items: int = 12_000) -> tuple[Histories, int]:
    """Histories as short as Amazon's: lengths 5 + geometric, mean about 9; items Zipf-like."""
    rng = np.random.default_rng(0)
    lengths = 4 + rng.geometric(0.2, interactions // 8)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), interactions)) + 1].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = (items * rng.random(offsets[-1]) ** 2).astype(np.int64)
    return Histories([str(user) for user in range(len(lengths))], offsets, events, np.arange(offsets[-1])), items


def folder(path: Path) -> tuple[Histories, int]:
    """Histories and catalogue size of a contract folder."""
    item_ids, histories = read_interactions(path)
    return histories, len(item_ids)


def epoch_seconds(interactions: int, config: TrainConfig) -> float:
    """Seconds of one epoch of training on that many synthetic interactions."""
    histories, items = synthetic(interactions)
    return len(histories.items) / packed_speed(histories, items, config)


def packed_speed(histories: Histories, items: int, config: TrainConfig) -> float:
    """Positions per second of `encoders.train`, packing included; the second epoch counts."""
    catalogue = Catalogue([str(item) for item in range(items)])
    with TemporaryDirectory() as directory:
        result = train(
            catalogue, histories, replace(config, epochs=2), directory=Path(directory), split=production(histories)
        )
    return result.curves[-1].positions / result.curves[-1].seconds


class PaddedSasrec(nn.Module):
    """The plain thing: histories padded on the left to 50, dot products, torch's own dropout, loss and Adam."""

    def __init__(self, items: int, config: TowersConfig) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(items, config.dim), nn.Embedding(config.history, config.dim)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, 4 * config.dim, config.dropout, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.blocks, enable_nested_tensor=False)
        self.dropout, self.norm = nn.Dropout(config.dropout), nn.LayerNorm(config.dim)

    def forward(self, rows_BT: Tensor) -> Tensor:
        steps = rows_BT.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        states: Tensor = self.layers(self.dropout(self.items(rows_BT) + self.positions.weight[:steps]), mask=causal)
        normed: Tensor = self.norm(states)
        return normed


def padded_speed(histories: Histories, items: int, config: TrainConfig, *, steps: int = 12, batch: int = 128) -> float:
    """Positions per second of the padded model on a few batches of users, shared negatives as one GEMM."""
    width = config.towers.history
    model = PaddedSasrec(items, config.towers)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    positions, started = 0, 0.0
    for step in range(steps + 2):
        if step == 2:  # the first steps import and allocate
            positions, started = 0, time.perf_counter()
        rows, mask = padded(histories.select(rng.integers(len(histories), size=batch)), width + 1)
        rows = F.pad(rows, (width + 1 - rows.shape[1], 0))
        mask = F.pad(mask, (width + 1 - mask.shape[1], 0))
        states = model(rows[:, :-1])
        positive = (states * model.items(rows[:, 1:])).sum(dim=-1, keepdim=True)
        negative = states @ model.items(torch.randint(items, (config.negatives,))).T
        logits = torch.cat([positive, negative], dim=-1)
        losses = F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits.shape[:2].numel(), dtype=torch.int64),
                                 reduction="none")  # fmt: skip
        valid = mask[:, 1:].flatten()
        (losses * valid).sum().div(valid.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
        positions += int(valid.sum())
    return positions / (time.perf_counter() - started)


def slope(seconds: dict[int, float]) -> float | None:
    """Exponent of seconds as a power of interactions, by least squares in logs."""
    if len(seconds) < 2:
        return None
    exponent, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return round(float(exponent), 3)


def interests_rate(histories: Histories, items: int, config: TrainConfig) -> dict[str, float]:
    """Users per second of the whole path (histories to interests), and of the bare forward pass."""
    scorer = TowersScorer(Towers(config.towers, Catalogue([str(item) for item in range(items)])))
    order = np.argsort(histories.lengths, kind="stable")[:8192]
    parts = [histories.select(order[start : start + 256]) for start in range(0, len(order), 256)]
    batches = [padded(part, config.towers.history) for part in parts]
    vectors = [scorer.items_VD[rows] for rows, _ in batches]

    def bare() -> None:
        for items_BTD, (_, mask) in zip(vectors, batches, strict=True):
            scorer.towers.user_interests(items_BTD, mask)

    whole = len(order) / timed(lambda: [scorer.interests(part) for part in parts])
    forward = len(order) / timed(bare)
    return {"users_per_second": round(whole), "bare": round(forward), "share": round(whole / forward, 3)}


def timed(work: Callable[[], object]) -> float:
    """Seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
