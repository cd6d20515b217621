"""Content as the towers read it: rows of every modality for the items asked for, wherever they come from.

The towers know this protocol alone. *Frozen* looks embeddings up that were encoded before; `adapted.Adapted` lets the
loss of a training step into the encoders.

Legend: N items asked for, P positions of a step, V items of the catalogue.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from encoders.catalogue import Catalogue

Modalities = Mapping[str, Tensor]


class ContentSource(Protocol):
    """What gives the towers the content of items."""

    def read(self, items_N: Tensor) -> tuple[Modalities, Modalities]:
        """(content[m] float [N, dim_m], present[m] bool [N]) of these items (int64 catalogue indices).

        Unit rows where a modality is present; what stands elsewhere means nothing.
        """
        ...

    def step(self, targets_P: Tensor) -> AbstractContextManager[object]:
        """Inside is one training step, whose next items (int64 catalogue indices, with repeats) these are."""
        ...

    def teaching_loss(self) -> Tensor | None:
        """What the source itself has to learn from the step that it is in: a scalar, or None."""
        ...


class Frozen(nn.Module):
    """The embeddings of the catalogue, looked up: an input, never trained and never saved with the weights."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self.names = [name for name, _ in catalogue.modalities]
        for name in self.names:
            self.register_buffer(f"content_{name}", torch.from_numpy(catalogue.content[name]), persistent=False)
            self.register_buffer(f"present_{name}", torch.from_numpy(catalogue.present[name]), persistent=False)

    def read(self, items_N: Tensor) -> tuple[Modalities, Modalities]:
        """As ContentSource."""
        content = {name: self.get_buffer(f"content_{name}")[items_N] for name in self.names}
        present = {name: self.get_buffer(f"present_{name}")[items_N] for name in self.names}
        return content, present

    def step(self, targets_P: Tensor) -> AbstractContextManager[object]:  # noqa: ARG002 (all steps are alike)
        """As ContentSource."""
        return nullcontext()

    def teaching_loss(self) -> None:
        """As ContentSource: nothing."""
        return
