"""Training with ID tables of 0.1, 1 and 10 million items: steps per second and memory, dense, row-wise and with a tail.

    python -m benchmarks.table                        # → benchmarks/results/table.json
    python -m benchmarks.table --items 10000000 --steps 20

Each case runs in a process of its own, one thread, on the same 200,000 synthetic events spread over the catalogue,
all of whose items are drawn as negatives: training steps of `encoders.training.train.Run` a second of CPU time (other
jobs on the machine then count little), and the peak of resident memory above what the data and the imports take. With
EMA a second table is held. The dense optimiser is left out where it would need over 8 GB.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.training import synthetic
from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluation.splits import production
from encoders.training.packing import batches, pack
from encoders.training.train import Run

RESULTS = Path(__file__).parent / "results" / "table.json"
CONFIG = TrainConfig(
    towers=TowersConfig(interests=1), initial="normal", negatives=2048, batch_rows=32, ema=0.0, threads=1, device="cpu"
)
BUCKETS = 100_000
CASES = {
    "dense": CONFIG,
    "rowwise": replace(CONFIG, table_optimiser="rowwise"),
    "rowwise, EMA": replace(CONFIG, table_optimiser="rowwise", ema=0.99),
    "rowwise, tail": replace(CONFIG, table_optimiser="rowwise", towers=replace(CONFIG.towers, tail_buckets=BUCKETS)),
}
_DENSE_BYTES = 4 * 64 * 5  # table, its running mean, gradient, two moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", "--table", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", choices=list(CASES), help="only this one, in this process; prints its JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.items[0], options.case, options.steps)))
        return
    report: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, 1 thread", "tail": BUCKETS}
    report["cases"] = [
        apart(items, case, options.steps)
        for items in options.items
        for case in CASES
        if case != "dense" or items * _DENSE_BYTES < 8e9
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'items':>12}  {'case':14} {'steps/s':>8} {'GB':>7} {'bytes/item':>11}")
    for row in report["cases"]:
        print(
            f"{row['items']:12,}  {row['case']:14} {row['steps_per_second']:8} {row['gigabytes']:7} "
            f"{row['bytes_per_item']:11,}"
        )
    print(json.dumps(report))


def apart(items: int, case: str, steps: int) -> dict[str, Any]:
    """`measure` in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "benchmarks.table", "--items", str(items), "--steps", str(steps), "--case", case]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return row


def measure(items: int, case: str, steps: int) -> dict[str, Any]:
    """Steps per second, and the growth of resident memory from before the towers to its peak in a step."""
    torch.set_num_threads(1)
    histories, _ = synthetic(200_000, items)
    catalogue = Catalogue([str(item) for item in range(items)])
    config, split = CASES[case], production(histories)
    before = psutil.Process().memory_info().rss
    run = Run(catalogue, split, config, Path("unused"))
    run.warm, run.frequency = torch.arange(items), torch.full((items,), 1 / items)
    rows = pack(split.train, config.towers.history, np.random.default_rng(0))
    run.towers.train()
    peak, started = 0, 0.0
    for step, batch in zip(range(steps + 3), batches(rows, config.batch_rows, run.device), strict=False):
        if step == 3:  # the first steps import and allocate
            started = time.process_time()
        run.step(batch, 1e-3, f"step {step}")
        peak = max(peak, psutil.Process().memory_info().rss)
    seconds = time.process_time() - started
    return {
        "items": items,
        "case": case,
        "steps_per_second": round(steps / seconds, 2),
        "gigabytes": round((peak - before) / 1e9, 2),
        "bytes_per_item": round((peak - before) / items),
        "rows": len(run.towers.item_tower.table),
    }


if __name__ == "__main__":
    main()
