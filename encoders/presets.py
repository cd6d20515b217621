"""Named configurations. docs/models.md has the figures each was measured at, with the commands.

Presets are data-independent apart from their length: the history they read, how many epochs, how many negatives.
"""

from dataclasses import replace

from encoders.config import TowersConfig, TrainConfig
from polytower.errors import UserError

_LONG = TowersConfig(history=100, dropout=0.4)
_SHORT = TowersConfig(history=50, dropout=0.5)

PRESETS: dict[str, TrainConfig] = {
    # long histories, a small catalogue: movielens-100k in about a minute on one core
    "demo": TrainConfig(preset="demo", towers=_LONG, negatives=0, batch_rows=16, epochs=20, validate_every=4),
    # short histories, a large catalogue: the Amazon sets
    "short": TrainConfig(preset="short", towers=replace(_SHORT, interests=1)),
    # a few seconds on a few hundred users: tests and first looks
    "tiny": TrainConfig(
        preset="tiny",
        towers=TowersConfig(dim=32, history=20, dropout=0.2, interests=2, content_width=32),
        negatives=0,
        epochs=6,
        validate_every=2,
    ),
}


def preset(name: str) -> TrainConfig:
    """The configuration of that name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
