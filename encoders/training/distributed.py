"""Data parallel training: one process per device (torchrun), each with its share of every step's rows.

All processes draw the same rows and the same negatives; each works on every size-th row of the step, gradients are
added up, and every process makes the same step: the loss is that of one process with the whole batch. Dropout masks are
drawn alike on all, for different rows; in-batch negatives and the sample that teaches content are each process's own.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polytower.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among `size`; rank 0 is the one that writes and reports."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums over all processes."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def from_first(self, *values: float) -> list[float]:
        """The values of rank 0."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.broadcast(told, 0)
        return [float(value) for value in told]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def add_gradients(self, parameters: Iterable[nn.Parameter], by_row: nn.Parameter | None = None) -> None:
        """Replaces each gradient by the sum over the processes; one that has none counts as zero.

        by_row: the parameter whose gradients are sparse, other rows in each process.
        """
        if self.size == 1:
            return
        dense = [parameter for parameter in parameters if parameter is not by_row]
        if by_row is not None:
            by_row.grad = _summed_rows(by_row, self.size)
        flat = torch.cat([_gradient(parameter).flatten() for parameter in dense])
        dist.all_reduce(flat)
        for parameter, part in zip(dense, torch.split(flat, [one.numel() for one in dense]), strict=True):
            parameter.grad = part.view_as(parameter)


ALONE = World()


@contextmanager
def processes() -> Iterator[World]:
    """Joins the processes that torchrun started (NCCL on CUDA, else gloo), and leaves them at the end.

    Raises UserError when this process was not started by torchrun.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UserError(
            "distributed training is started by torchrun: torchrun --nproc-per-node 2 -m polytower.cli experiment …"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _summed_rows(table: nn.Parameter, size: int) -> Tensor:
    """The sum of sparse gradients with other rows in each process: rows and values go round, padded to one length."""
    rows_U, values_UD = torch.zeros(0, dtype=torch.int64, device=table.device), table.detach()[:0]
    if table.grad is not None:
        gradient = table.grad.coalesce()
        rows_U, values_UD = gradient.indices()[0], gradient.values()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows_U.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(rows_U)], device=rows_U.device))
    longest = max(int(count) for count in counts)
    rows = [rows_U.new_zeros(longest) for _ in range(size)]
    values = [values_UD.new_zeros(longest, values_UD.shape[1]) for _ in range(size)]
    dist.all_gather(rows, torch.cat([rows_U, rows_U.new_zeros(longest - len(rows_U))]))
    dist.all_gather(values, torch.cat([values_UD, values_UD.new_zeros(longest - len(rows_U), values_UD.shape[1])]))
    all_rows = torch.cat([part[: int(count)] for part, count in zip(rows, counts, strict=True)])
    all_values = torch.cat([part[: int(count)] for part, count in zip(values, counts, strict=True)])
    return torch.sparse_coo_tensor(all_rows[None], all_values, table.shape).coalesce()
