"""What test_distributed.py runs in each of two processes: `python -m tests.encoders.together OUT`, as torchrun does."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.config import TowersConfig, TrainConfig
from encoders.training import checkpoint
from encoders.training.distributed import World, processes
from encoders.training.optimise import RowwiseAdam
from encoders.training.sharded import ShardedTable
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
# what each process asks the sharded table for: other rows, common rows, none
ASKED = [[[5, 2, 9, 0], [3, 4], []], [[2, 7], [], [4, 3, 8]]]


def table() -> Tensor:
    """The table that is sharded, [11, 4]."""
    return torch.randn(11, 4, generator=torch.Generator().manual_seed(0))


def goal(rows_U: Tensor) -> Tensor:
    """What the rows are drawn to, so that every row has a gradient of its own."""
    return torch.sin(rows_U[:, None] + torch.arange(4.0))


def _sharded(world: World, out: Path) -> None:
    shards = ShardedTable(ShardedTable.part(table(), world), world)
    optimiser = RowwiseAdam(shards.table)
    for asked in ASKED[world.rank]:
        rows_U = torch.tensor(asked, dtype=torch.int64)
        values_UD = shards(rows_U)
        (values_UD - goal(rows_U)).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step(0.1)
    checkpoint.write_tensors(out / f"shard-{world.rank}.safetensors", {"table": shards.table})


def main(out: Path) -> None:
    """Trains each case in all processes, rank 0 keeping the losses; and steps a sharded table."""
    with processes() as world:
        for name, config in CASES.items():
            result = train(tiny_catalogue(content=False), tiny_histories(), config, directory=out / name, world=world)
            kept = {"losses": [point.loss for point in result.curves], "metrics": result.metrics}
            checkpoint.write_json(out / f"{name}-{world.rank}.json", kept)
            checkpoint.write_tensors(out / f"{name}-{world.rank}.safetensors", result.towers.state_dict())
        _sharded(world, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
