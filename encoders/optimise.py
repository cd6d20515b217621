"""Adam with its state as plain tensors, so that a checkpoint is safetensors and resuming is exact.

torch.optim is left alone for a second reason: its first step imports torch's compiler (seconds on a small machine).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Adam:
    """AdamW (Loshchilov and Hutter 2019) on all parameters of a module, by torch's fused kernel.

    Betas .9 and .999, epsilon 1e-8; weight decay 0 makes it Adam.
    """

    def __init__(self, module: nn.Module, *, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.parameters = dict(module.named_parameters())
        self.first = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.steps = {name: torch.zeros((), device=value.device) for name, value in self.parameters.items()}

    def step(self, rate: float) -> None:
        """One step with learning rate `rate`; parameters without a gradient stay. Gradients are dropped."""
        due = [name for name, value in self.parameters.items() if value.grad is not None]
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
                beta1=0.9,
                beta2=0.999,
                weight_decay=self.weight_decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
        for value in self.parameters.values():
            value.grad = None

    def state(self) -> dict[str, Tensor]:
        """All of it, by name."""
        kinds = {"first": self.first, "second": self.second, "steps": self.steps}
        return {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in self.state().items():
            value.copy_(state[name])
