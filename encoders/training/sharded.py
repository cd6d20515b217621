"""An ID table that no single machine holds: each process keeps every size-th row, with the optimiser state of its own.

A look-up is an all-to-all there (which rows) and back (their values); its gradient travels the same way, and each
process steps its own rows (`optimise.RowwiseAdam`). The platform's own training keeps the whole table in each process;
docs/adr/0008-big-id-tables.md says when this one is due.

Legend: V rows in all, P processes, U rows asked for by this process, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.training.distributed import World


class ShardedTable(nn.Module):
    """Rows rank, rank + P, rank + 2 P … of a table [V, D]."""

    def __init__(self, rows: Tensor, world: World) -> None:
        """rows: this process's part, in order: what `part` gives of the whole."""
        super().__init__()
        self.world = world
        self.table = nn.Parameter(rows)

    @staticmethod
    def part(whole_VD: Tensor, world: World) -> Tensor:
        """The rows that belong to this process."""
        return whole_VD[world.rank :: world.size].clone()

    def forward(self, rows_U: Tensor) -> Tensor:
        """The values of these rows (int64), wherever they are: [U, D]. All processes must call it together."""
        owner_U = rows_U % self.world.size
        order_U = owner_U.argsort(stable=True)
        asking = owner_U.bincount(minlength=self.world.size)
        asked = torch.empty_like(asking)
        dist.all_to_all_single(asked, asking)
        counts = asked.tolist(), asking.tolist()
        here = rows_U.new_empty(sum(counts[0]))
        dist.all_to_all_single(here, rows_U[order_U] // self.world.size, counts[0], counts[1])
        found = F.embedding(here, self.table, sparse=True)
        back: Tensor = _Exchange.apply(found, *counts)  # type: ignore[no-untyped-call]
        return back[order_U.argsort()]


class _Exchange(torch.autograd.Function):
    """Rows to the processes that asked for them; their gradients back to the owners."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.counts = sent, received
        return _exchanged(values, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.counts
        return _exchanged(gradients[0], received, sent), None, None


def _exchanged(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    arrived = values.new_empty(sum(received), values.shape[1])
    dist.all_to_all_single(arrived, values.contiguous(), received, sent)
    return arrived
