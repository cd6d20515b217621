"""What test_distributed.py runs in each of two processes: `python -m tests.encoders.together OUT`, as torchrun does."""

import sys
from dataclasses import replace
from pathlib import Path

from encoders.config import TowersConfig, TrainConfig
from encoders.training import checkpoint
from encoders.training.distributed import processes
from encoders.training.train import train
from tests.encoders.data import tiny_catalogue, tiny_histories

# no dropout: its masks belong to the rows of a process. Batches of 5 rows do not divide by two.
CONFIG = TrainConfig(
    towers=TowersConfig(dim=16, history=8, dropout=0.0, interests=2),
    epochs=3,
    batch_rows=5,
    negatives=0,
    validate_every=1,
    threads=1,
    device="cpu",
)
CASES = {
    "dense": CONFIG,
    "rowwise": replace(CONFIG, table_optimiser="rowwise"),
    "sampled": replace(CONFIG, negatives=10, logq=True),
}


def main(out: Path) -> None:
    """Trains each case in all processes, rank 0 keeping the losses."""
    with processes() as world:
        for name, config in CASES.items():
            result = train(tiny_catalogue(content=False), tiny_histories(), config, directory=out / name, world=world)
            kept = {"losses": [point.loss for point in result.curves], "metrics": result.metrics}
            checkpoint.write_json(out / f"{name}-{world.rank}.json", kept)
            checkpoint.write_tensors(out / f"{name}-{world.rank}.safetensors", result.towers.state_dict())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
