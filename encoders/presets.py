"""Named configurations. docs/models.md says what each is for and what it was measured at, docs/LOG.md keeps the runs.

The first five are to be used. The peers are 64 wide, as in their papers, on one backbone and recipe, to compare with.
"""

from dataclasses import replace

from encoders.config import TowersConfig, TrainConfig
from polytower.errors import UserError

_SHORT = TrainConfig(
    preset="short",
    towers=TowersConfig(dim=256, heads=4, history=50, dropout=0.5, recency=True, interests=1),
    negatives=2048,
    batch_rows=32,
    epochs=9,
    validate_every=3,
)
_LONG = TrainConfig(
    preset="long",
    towers=TowersConfig(dim=128, blocks=2, history=200, dropout=0.2, interests=1),
    negatives=1024,
    batch_rows=8,
    epochs=12,
    validate_every=2,
)
# the peers' width, and room for nothing else: what differs between them is the interests
_NARROW = replace(_SHORT, towers=replace(_SHORT.towers, dim=64, heads=2, recency=False), epochs=15)
_FOUR = replace(_NARROW, towers=replace(_NARROW.towers, interests=4))

_MULTIMODAL = replace(
    _SHORT,
    preset="multimodal",
    towers=replace(
        _SHORT.towers, content_dim=128, linear=True, fusion="none", whiten=256, modality_dropout=0.0, cold="ridge"
    ),
    content_weight=0.0,
)

PRESETS: dict[str, TrainConfig] = {
    # movielens-100k in two minutes on one core, and the default everywhere: long histories; the softmax runs over the
    # whole catalogue while it has at most 4,096 items. Two interests hold what one reaches, four lose (docs/LOG.md)
    "demo": TrainConfig(
        preset="demo",
        towers=TowersConfig(history=100, dropout=0.4, interests=2),
        negatives=4096,
        batch_rows=16,
        epochs=20,
        validate_every=5,
    ),
    # short histories, a large catalogue (the Amazon sets): what the model lacks is room to remember, so it is wide
    "short": _SHORT,
    # histories of hundreds (movielens-1m): deeper, little dropout, and many small steps
    "long": _LONG,
    # items that are described: half of the width is a block for content, and new items are placed by a ridge
    "multimodal": _MULTIMODAL,
    # the ranking loss trains the encoders of text and pictures too (EM3): LoRA, Q-Former, content-ID contrast
    "em3": replace(
        _MULTIMODAL,
        preset="em3",
        towers=replace(_MULTIMODAL.towers, fusion="qformer", contrast_dim=64),
        lora_rank=8,
    ),
    # several towers whose interests differ, over items that are known by what they are, too (MTMI, arXiv 2403.05122)
    "mtmi": replace(
        _SHORT,
        preset="mtmi",
        towers=replace(
            _SHORT.towers,
            dim=64,
            heads=2,
            history=100,
            dropout=0.4,
            recency=False,
            interests=4,
            extractor="towers",
            shrinkage=1.0,
            linear=True,
            fusion="none",
            whiten=256,
        ),
        batch_rows=16,
        epochs=12,
        objective="soft_consistent",
        repel="cosine",
        repel_weight=0.1,
    ),
    # items are what they are made of, and nothing else: one encoder, pretrained on them, for catalogues never seen
    "mmsrec": TrainConfig(
        preset="mmsrec",
        towers=TowersConfig(
            family="mmsrec", dim=128, heads=8, blocks=2, history=50, dropout=0.2, interests=1, whiten=256
        ),
        initial="identity",
        temperature=0.05,
        negatives=2048,
        batch_rows=64,
        learning_rate=1e-3,
        pretrain_epochs=10,
        epochs=40,
        validate_every=5,
    ),
    # events with a query, and users who search: (query, item) pairs, pretrained before the training
    "seminar": replace(
        _SHORT,
        preset="seminar",
        towers=replace(_SHORT.towers, dim=128, pair="gated", shrinkage=1.0),
        unit_epochs=3,
        search=True,
    ),
    # a few seconds on a few hundred users: tests and first looks
    "tiny": TrainConfig(
        preset="tiny",
        towers=TowersConfig(dim=32, history=20, dropout=0.2, interests=2, content_width=32),
        negatives=0,
        epochs=6,
        validate_every=2,
    ),
    # peers
    "narrow": replace(_NARROW, preset="narrow"),
    "narrow-k4": replace(_FOUR, preset="narrow-k4"),
    "sasrec": replace(
        _NARROW,
        preset="sasrec",
        towers=replace(_NARROW.towers, dropout=0.2),
        initial="normal",
        negatives=256,
        learning_rate=1e-3,
        final_rate=1.0,
        ema=0.0,
        epochs=60,
    ),
    "comirec-sa": replace(
        _FOUR, preset="comirec-sa", towers=replace(_FOUR.towers, extractor="comirec_sa"), objective="comirec"
    ),
    "comirec-dr": replace(
        _FOUR, preset="comirec-dr", towers=replace(_FOUR.towers, extractor="comirec_dr"), objective="comirec"
    ),
    "mind": replace(
        _FOUR,
        preset="mind",
        towers=replace(_FOUR.towers, extractor="mind", adaptive=True),
        objective="label_aware",
    ),
    "remi": replace(_FOUR, preset="remi", towers=replace(_FOUR.towers, extractor="comirec_sa"), objective="remi"),
}


def preset(name: str) -> TrainConfig:
    """The configuration of that name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
