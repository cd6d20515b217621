"""Families of models by name (`TowersConfig.family`): what evaluates, builds and serves knows `model.Model` alone."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from encoders.config import TowersConfig
from encoders.towers.content_tower import Content
from encoders.towers.mmsrec import Encoder, MMSRec
from encoders.towers.model import Model
from encoders.towers.towers import Towers, UserTower


@dataclass(frozen=True)
class Family:
    """model: over a catalogue. user_tower (a `model.Reader`), content_tower (a `model.Asked`): the parts of it that
    travel to the server. by_id: whether items have weights of their own, so that a catalogue is part of the model.
    """

    model: type[Model]
    user_tower: Callable[[TowersConfig], nn.Module]
    content_tower: Callable[[TowersConfig], nn.Module]
    by_id: bool


FAMILIES = {
    "towers": Family(Towers, UserTower, Content, by_id=True),
    "mmsrec": Family(MMSRec, Encoder, Encoder, by_id=False),
}
