"""The content path of the item tower: modalities, some missing -> features -> a content embedding.

Two maps can carry it, and their outputs are added: a *linear* one of all features, which starts as a ridge regression
(`closed_form`), and a *fused* one, through a fusion of the registry and a hidden layer.

Legend: N items, M modalities, C width of all features together, H content width, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.config import TowersConfig
from encoders.towers.backbone import Dropout
from encoders.towers.content_source import Modalities
from encoders.towers.fusion import FUSIONS


class Features(nn.Module):
    """Each modality as unit rows, zeros where an item lacks it: as it was encoded, or centred and whitened.

    Whitening (`TowersConfig.whiten`) is fitted once (`fit`) and fixed from then on; it travels with the weights.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.widths = dict(config.features)
        self.whitened = list(self.widths) if config.whiten else []
        for name in self.whitened:
            size = dict(config.modalities)[name]
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"basis_{name}", torch.zeros(size, self.widths[name]))

    def forward(self, content: Modalities, present: Modalities) -> Tensor:
        """[N, C], the modalities side by side."""
        parts = [self._rows(name, content[name]) for name in self.widths]
        masks = [present[name][:, None] for name in self.widths]
        return torch.cat([torch.where(mask, part, 0.0) for part, mask in zip(parts, masks, strict=True)], dim=1)

    def split(self, features_NC: Tensor) -> list[Tensor]:
        """The modalities' columns of [N, C]."""
        return list(torch.split(features_NC, list(self.widths.values()), dim=1))

    def _rows(self, name: str, rows: Tensor) -> Tensor:
        if name not in self.whitened:
            return rows
        return F.normalize((rows - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"basis_{name}"), dim=-1)


class Content(nn.Module):
    """Features -> a unit vector in the content's part of the space, zeros in the rest of it.

    In one space (`content_dim` 0) that part is all of it; in blocks it is the one behind the ID's.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        width, out = config.content_width, config.content_dim or config.id_dim
        self.widths = dict(config.modalities)
        self.before = config.id_dim if config.content_dim else 0
        self.after = config.dim - self.before - out
        self.features = Features(config)
        self.dropout, self.alone = Dropout(config.content_dropout), config.modality_dropout
        self.linear = nn.Linear(sum(self.features.widths.values()), out, bias=False) if config.linear else None
        self.fusion = FUSIONS[config.fusion](config) if config.fusion != "none" else None
        if self.fusion is not None:
            self.projections = nn.ModuleDict({name: nn.Linear(size, width) for name, size in config.features})
            last = nn.Linear(width, out)
            if self.linear is not None:  # training starts where the ridge is
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            self.out = nn.Sequential(nn.GELU(), last)

    def forward(self, content: Modalities, present: Modalities) -> Tensor:
        """content[m]: [N, dim_m]; present[m]: bool [N]. [N, D], unit rows where anything is present."""
        if self.training and self.alone > 0:
            present = some_alone(present, self.alone)
        features_NC = self.dropout(self.features(content, present))
        sums = []
        if self.linear is not None:
            sums.append(self.linear(features_NC))
        if self.fusion is not None:
            present_NM = torch.stack([present[name] for name in self.projections], dim=1)
            sums.append(self.out(self.fusion(self._projected(features_NC), present_NM)))
        return F.pad(F.normalize(torch.stack(sums).sum(dim=0), dim=-1), (self.before, self.after))

    def _projected(self, features_NC: Tensor) -> Tensor:
        """[N, M, H]; the rows are as loud as a layer expects them, elements of size one."""
        parts = self.features.split(features_NC)
        projected = [
            project(part * part.shape[1] ** 0.5) for project, part in zip(self.projections.values(), parts, strict=True)
        ]
        return torch.stack(projected, dim=1)


def some_alone(present: Modalities, share: float) -> Modalities:
    """The same, but a share of the items has one modality left: any of its own, as likely as another."""
    present_NM = torch.stack(list(present.values()), dim=1)
    drawn_NM = torch.rand(present_NM.shape, device=present_NM.device).masked_fill(~present_NM, -1.0)
    only_NM = F.one_hot(drawn_NM.argmax(dim=1), len(present)).bool()
    alone_N1 = torch.rand(len(present_NM), 1, device=present_NM.device) < share
    kept_NM = present_NM & (only_NM | ~alone_N1)
    return dict(zip(present, kept_NM.unbind(dim=1), strict=True))
