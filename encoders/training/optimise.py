"""Adam with its state as plain tensors, so that a checkpoint is safetensors and resuming is exact; and, for tables of
millions of rows, an Adam and a running mean whose cost is that of the rows a step touches.

torch.optim is left alone for a second reason: its first step imports torch's compiler (seconds on a small machine).

Legend: V rows of the table, U rows touched by a step (distinct), D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_BETAS = 0.9, 0.999
_EPSILON = 1e-8
_CHUNK = 1 << 18  # rows of the mean brought up to date at a time


class Adam:
    """AdamW (Loshchilov and Hutter 2019) on the named parameters, by torch's fused kernel.

    Betas .9 and .999, epsilon 1e-8; weight decay 0 makes it Adam. shares: prefix of names -> share of the learning rate
    that these parameters get.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, shares: Mapping[str, float] | None = None
    ) -> None:
        self.weight_decay = weight_decay
        self.groups: dict[float, list[str]] = {}
        for name in parameters:
            share = next((share for prefix, share in (shares or {}).items() if name.startswith(prefix)), 1.0)
            self.groups.setdefault(share, []).append(name)
        self.parameters = dict(parameters)
        self.first = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.steps = {name: torch.zeros((), device=value.device) for name, value in self.parameters.items()}

    def step(self, rate: float) -> None:
        """One step with learning rate `rate`; parameters without a gradient stay. Gradients are dropped."""
        for share, names in self.groups.items():
            self._step(rate * share, [name for name in names if self.parameters[name].grad is not None])
        for value in self.parameters.values():
            value.grad = None

    def _step(self, rate: float, due: list[str]) -> None:
        with torch.no_grad():
            torch._foreach_add_([self.steps[name] for name in due], 1)
            torch._fused_adamw_(
                [self.parameters[name] for name in due],
                [value.grad for name in due if (value := self.parameters[name]).grad is not None],
                [self.first[name] for name in due],
                [self.second[name] for name in due],
                [],
                [self.steps[name] for name in due],
                lr=rate,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                weight_decay=self.weight_decay,
                eps=_EPSILON,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """All of it, by name."""
        kinds = {"first": self.first, "second": self.second, "steps": self.steps}
        return {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}


class RowwiseAdam:
    """Adam for a table [V, D] with sparse gradients: one second moment a row, no first moment; 8 bytes of state a row.

    A row's second moment is the mean of its squared gradient over D (the row-wise sharing of Gupta et al. 2014 and
    TorchRec), decayed by .999 for every step since the row was last touched, so that it is Adam's own of rows that
    mostly have no gradient: rare rows move far when they move. Without the first moment a row moves by the gradient
    itself, when it is met and not in the steps after. Weight decay is not applied.
    """

    def __init__(self, table: nn.Parameter) -> None:
        self.table = table
        self.second = torch.zeros(len(table), device=table.device)
        self.touched = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        self.steps = torch.zeros((), dtype=torch.int64)

    def step(self, rate: float, mean: "RowwiseMean | None" = None) -> None:
        """One step on the rows with a gradient, whose mean is brought up to date before. The gradient is dropped."""
        self.steps += 1
        if self.table.grad is None:
            return
        gradient = self.table.grad.coalesce()
        rows_U, values_UD = gradient.indices()[0], gradient.values()
        self.table.grad = None
        if mean is not None:
            mean.before(rows_U)
        step, beta = int(self.steps), _BETAS[1]
        with torch.no_grad():
            second_U = self.second[rows_U] * beta ** (step - self.touched[rows_U]).float()
            second_U += (1 - beta) * values_UD.square().mean(dim=1)
            self.second[rows_U], self.touched[rows_U] = second_U, step
            scale_U = rate / ((second_U / (1 - beta**step)).sqrt() + _EPSILON)
            self.table.index_add_(0, rows_U, values_UD * scale_U[:, None], alpha=-1)

    def state(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {"second": self.second, "touched": self.touched, "steps": self.steps}


class RowwiseMean:
    """Running mean of a table [V, D] that costs a step only the rows that it touches, and is the plain one exactly.

    A row stands still between two touches, so the mean moves towards it by the product of the decays in between:
    `log_decay` is the sum of their logarithms, `seen` what it was when the row was last brought up to date.
    """

    def __init__(self, table: nn.Parameter) -> None:
        self.table = table
        self.mean = table.detach().clone()
        self.seen = torch.zeros(len(table), dtype=torch.float64, device=table.device)
        self.log_decay = torch.zeros((), dtype=torch.float64)

    def before(self, rows_U: Tensor) -> None:
        """Brings these rows up to date with the weights that they have; to be called before a step changes them."""
        with torch.no_grad():
            kept_U = (self.log_decay.to(self.seen.device) - self.seen[rows_U]).exp().float()
            self.mean[rows_U] = self.table[rows_U].lerp(self.mean[rows_U], kept_U[:, None])
            self.seen[rows_U] = self.log_decay.item()

    def after(self, decay: float) -> None:
        """A step was made: the mean decays once more."""
        self.log_decay += torch.tensor(max(decay, 1e-30), dtype=torch.float64).log()

    def whole(self) -> Tensor:
        """The mean of all rows, up to date: [V, D], the object's own."""
        for start in range(0, len(self.table), _CHUNK):
            stop = min(start + _CHUNK, len(self.table))
            self.before(torch.arange(start, stop, device=self.table.device))
        return self.mean

    def state(self) -> dict[str, Tensor]:
        """All but the mean itself."""
        return {"seen": self.seen, "log_decay": self.log_decay}


class Optimiser:
    """Steps all weights and keeps their running mean; the table of that name row by row, the others densely.

    shares: as in Adam.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        weight_decay: float,
        averaged: bool = True,
        table: str | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        parameters = dict(module.named_parameters())
        self.name, self.table = table, parameters.pop(table) if table else None
        self.adam = Adam(parameters, weight_decay=weight_decay, shares=shares)
        self.mean = {name: value.detach().clone() for name, value in parameters.items()}
        self.rows = RowwiseAdam(self.table) if self.table is not None else None
        # without averaging the mean is the table itself, and no second one is held
        self.rows_mean = RowwiseMean(self.table) if self.table is not None and averaged else None

    def step(self, rate: float, decay: float) -> None:
        """One step with learning rate `rate`; then the mean goes towards the weights by 1 - decay."""
        self.adam.step(rate)
        if self.rows is not None:
            self.rows.step(rate, self.rows_mean)
        if self.rows_mean is not None:
            self.rows_mean.after(decay)
        with torch.no_grad():
            weights = [value.detach() for value in self.adam.parameters.values()]
            torch._foreach_lerp_(list(self.mean.values()), weights, 1 - decay)

    def average(self) -> dict[str, Tensor]:
        """The running mean by name of the parameter (not of a table without averaging); not to be written to."""
        if self.name is None or self.rows_mean is None:
            return dict(self.mean)
        return self.mean | {self.name: self.rows_mean.whole()}

    def state(self) -> dict[str, Tensor]:
        """All of it but the weights, by name."""
        found = self.adam.state()
        if self.rows is not None:
            found |= {f"rows.{name}": value for name, value in self.rows.state().items()}
        if self.rows_mean is not None:
            found |= {f"rows_mean.{name}": value for name, value in self.rows_mean.state().items()}
        return found

    def restore(self, state: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        """The inverse of `state` and `average`."""
        for name, value in self.state().items():
            value.copy_(state[name])
        for name, value in self.average().items():
            value.copy_(average[name])
