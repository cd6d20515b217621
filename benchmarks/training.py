"""Training speed: packed rows and the fused softmax against padded SASRecs, time to quality, cost by data size.

    python -m benchmarks.training                     # synthetic, short histories → benchmarks/results/training.json
    python -m benchmarks.training --data ../shared/data/amazon-beauty --quality 10 --recbole /tmp/recbole/bin/python

Everything is measured on one thread, same width, layers and data, in seconds of CPU time, which other jobs on the
machine disturb least. Positions (training pairs) a second: ours, a plain SASRec padded to 50 with the same number of
shared negatives, and RecBole's model (`recbole_sasrec.py`; full softmax, one padded row a pair), where --recbole names
an interpreter that has it. Time to quality (--quality N): the plain SASRec trains N epochs; ours, preset "short",
stops at the first epoch whose validation NDCG@10 is as good. Cost for growing data as a log-log slope, packing
and a few steps each. Users a second of `TowersScorer.interests` beside the bare forward pass on the same, padded
batches.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from encoders.evaluation.evaluate import TowersScorer, padded, validation_ndcg
from encoders.evaluation.splits import leave_one_out, production
from encoders.presets import preset
from encoders.towers.towers import Towers
from encoders.training.packing import Rows, batches, pack
from encoders.training.train import Epoch, Run, train
from pipelines.load.dataset import read_folder

RESULTS = Path(__file__).parent / "results" / "training.json"
_USERS = 128  # of a step of the padded model
CONFIG = TrainConfig(towers=TowersConfig(interests=1), epochs=1, ema=0.99, threads=1, device="cpu", patience=99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--quality", type=int, default=0, metavar="EPOCHS", help="of the plain SASRec, on --data")
    parser.add_argument("--recbole", type=Path, metavar="PYTHON", help="an interpreter that can import recbole")
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
    if options.recbole:
        report["recbole_positions_per_second"] = round(recbole_speed(options.recbole, histories, items, config))
    else:
        report["recbole_positions_per_second"] = "skipped: no --recbole interpreter"
    if options.quality:
        report["quality"] = time_to_quality(histories, items, config, options.quality)
    report["seconds_per_epoch"] = {size: round(epoch_seconds(size, config), 2) for size in options.sizes}
    report["log_log_slope"] = slope(report["seconds_per_epoch"])
    report["interests"] = interests_rate(histories, items, config)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report.items():
        print(f"{name:32} {value}")
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
    data, _ = read_folder(path)
    return data.histories, len(data.item_ids)


def epoch_seconds(interactions: int, config: TrainConfig, *, steps: int = 20) -> float:
    """Seconds of one epoch on that many synthetic interactions: packing them all, and `steps` steps scaled up."""
    histories, items = synthetic(interactions)
    run, rows, packing = prepared(histories, items, config)
    return packing + step_seconds(run, rows, steps) * len(rows) / config.batch_rows


def packed_speed(histories: Histories, items: int, config: TrainConfig) -> float:
    """Positions per second of `encoders.training.train`, packing included."""
    run, rows, packing = prepared(histories, items, config)
    seconds = packing + step_seconds(run, rows, 40) * len(rows) / config.batch_rows
    return int((rows.segments > 0).sum()) / seconds


def prepared(histories: Histories, items: int, config: TrainConfig) -> tuple[Run, Rows, float]:
    """A training run, the rows of an epoch, and the seconds that packing took."""
    catalogue = Catalogue([str(item) for item in range(items)])
    run = Run(catalogue, production(histories), replace(config, initial="normal"), Path("unused"))
    started = time.process_time()
    rows = pack(histories, config.towers.history, np.random.default_rng(0))
    return run, rows, time.process_time() - started


def step_seconds(run: Run, rows: Rows, steps: int) -> float:
    """Mean seconds of a training step, batches made on the way."""
    run.towers.train()
    started = 0.0
    for step, batch in zip(range(steps + 2), batches(rows, run.config.batch_rows, run.device), strict=False):
        if step == 2:  # the first steps import and allocate
            started = time.process_time()
        run.step(batch, 1e-3, f"step {step}")
    return (time.process_time() - started) / steps


def recbole_speed(python: Path, histories: Histories, items: int, config: TrainConfig, *, steps: int = 4) -> float:
    """Positions per second of RecBole's SASRec, one left-aligned padded row for each training pair."""
    rng, width, shape = np.random.default_rng(0), config.towers.history, config.towers
    able = np.flatnonzero(histories.lengths >= 2)
    users = rng.choice(able, (steps, 512), p=(histories.lengths[able] - 1) / (histories.lengths[able] - 1).sum())
    rows, lengths = np.zeros((steps, 512, width), dtype=np.int64), np.zeros((steps, 512), dtype=np.int64)
    targets = np.zeros((steps, 512), dtype=np.int64)
    for place, user in np.ndenumerate(users):
        events = histories.of(int(user))
        end = int(rng.integers(1, len(events)))
        prefix = events[max(0, end - width) : end]
        rows[place][: len(prefix)], lengths[place], targets[place] = prefix + 1, len(prefix), events[end] + 1
    with TemporaryDirectory() as directory:
        stored = Path(directory) / "batches.npz"
        np.savez(stored, rows=rows, lengths=lengths, targets=targets)
        sizes = (items, shape.dim, width, shape.blocks, shape.heads, shape.dropout)
        command = [str(python), "-m", "benchmarks.recbole_sasrec", str(stored), *map(str, sizes)]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"RecBole's SASRec did not run: {found.stderr.strip().splitlines()[-1]}")
    return float(found.stdout.splitlines()[-1])


def time_to_quality(histories: Histories, items: int, config: TrainConfig, epochs: int) -> dict[str, float]:
    """Seconds of the plain SASRec for `epochs` epochs, and of ours to the same validation NDCG@10 or a better one."""
    split = leave_one_out(histories)
    model, started = PaddedSasrec(items, config.towers), time.process_time()
    for _ in padded_steps(model, split.train, config, steps=epochs * -(-len(split.train) // _USERS), users=_USERS):
        pass
    padded_seconds = time.process_time() - started
    wanted, _ = validation_ndcg(PaddedScorer(model.eval(), config.towers.history), split.validation, items)
    reached: list[tuple[int, float, float]] = []
    started = time.process_time()

    class Reached(Exception):  # noqa: N818 (no error: the run may stop)
        pass

    def look(point: Epoch) -> None:
        reached.append((point.epoch, point.ndcg_10 or 0.0, time.process_time() - started))
        if reached[-1][1] >= wanted:
            raise Reached

    ours = replace(preset("short"), validate_every=1, patience=99, threads=1, device="cpu")
    with TemporaryDirectory() as directory, suppress(Reached):
        catalogue = Catalogue([str(item) for item in range(items)])
        train(catalogue, histories, ours, directory=Path(directory), on_epoch=look)
    epoch, ndcg, seconds = reached[-1]
    return {
        "padded_ndcg@10": round(wanted, 4), "padded_seconds": round(padded_seconds, 1), "padded_epochs": epochs,
        "ndcg@10": round(ndcg, 4), "seconds": round(seconds, 1), "epochs": epoch,
        "times_shorter": round(padded_seconds / seconds, 1),
    }  # fmt: skip


class PaddedSasrec(nn.Module):
    """The plain thing: histories padded to 50, dot products, torch's own dropout, loss and Adam."""

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


class PaddedScorer:
    """Ranks by the plain SASRec's inner products."""

    def __init__(self, model: PaddedSasrec, width: int) -> None:
        self.model, self.width = model, width

    def __call__(self, histories: Histories) -> Tensor:
        rows, mask = padded(histories, self.width)
        last = mask.sum(dim=1) - 1  # padded on the right here: causal, so what follows the last event is not read
        with torch.no_grad():
            states = self.model(rows)[torch.arange(len(rows)), last]
            scores: Tensor = states @ self.model.items.weight.T
        return scores


def padded_speed(histories: Histories, items: int, config: TrainConfig, *, steps: int = 12) -> float:
    """Positions per second of the padded model on a few batches of users, shared negatives as one GEMM."""
    positions, started = 0, 0.0
    found = padded_steps(PaddedSasrec(items, config.towers), histories, config, steps=steps + 2, users=_USERS)
    for step, count in enumerate(found):
        positions += count
        if step == 1:  # the first steps import and allocate
            positions, started = 0, time.process_time()
    return positions / (time.process_time() - started)


def padded_steps(
    model: PaddedSasrec, histories: Histories, config: TrainConfig, *, steps: int, users: int
) -> Iterator[int]:
    """Trains on `users` random users a step; yields how many positions each step had."""
    width, items = config.towers.history, model.items.num_embeddings
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows, mask = padded(histories.select(rng.integers(len(histories), size=users)), width + 1)
        rows, mask = (F.pad(part, (0, width + 1 - part.shape[1])) for part in (rows, mask))
        states = model(rows[:, :-1])
        positive = (states * model.items(rows[:, 1:])).sum(dim=-1, keepdim=True)
        negative = states @ model.items(torch.randint(items, (config.negatives,))).T
        logits = torch.cat([positive, negative], dim=-1)
        losses = F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits.shape[:2].numel(), dtype=torch.int64),
                                 reduction="none")  # fmt: skip
        valid = mask[:, 1:].flatten()
        (losses * valid).sum().div(valid.sum().clamp(min=1)).backward()
        optimiser.step()
        optimiser.zero_grad()
        yield int(valid.sum())


def slope(seconds: dict[int, float]) -> float | None:
    """Exponent of seconds as a power of interactions, by least squares in logs."""
    if len(seconds) < 2:
        return None
    exponent, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return round(float(exponent), 3)


def interests_rate(histories: Histories, items: int, config: TrainConfig) -> dict[str, float]:
    """Users per second of the whole path (histories to interests), and of the bare forward pass."""
    scorer = TowersScorer(Towers(config.towers, Catalogue([str(item) for item in range(items)])))
    order = np.argsort(histories.lengths, kind="stable")
    order = order[:: -(-len(order) // 8192)]  # users of all lengths, like ones together as in a generation's build
    parts = [histories.select(order[start : start + 256]) for start in range(0, len(order), 256)]
    questions = [padded(part, config.towers.history) for part in parts]
    vectors = [scorer.items_VD[rows] for rows, _ in questions]

    def bare() -> None:
        for items_BTD, (_, mask) in zip(vectors, questions, strict=True):
            scorer.towers.user_interests(items_BTD, mask)

    seconds = timed(lambda: [scorer.interests(part) for part in parts], bare)
    whole, forward = (len(order) / each for each in seconds)
    return {"users_per_second": round(whole), "bare": round(forward), "share": round(whole / forward, 3)}


def timed(*works: Callable[[], object], rounds: int = 9) -> list[float]:
    """Seconds of each in its fastest of some rounds, turn by turn."""
    seconds = [float("inf")] * len(works)
    for _ in range(rounds):
        for place, work in enumerate(works):
            started = time.process_time()
            work()
            seconds[place] = min(seconds[place], time.process_time() - started)
    return seconds


if __name__ == "__main__":
    main()
