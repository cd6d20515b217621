"""Every choice that changes a result, as frozen dataclasses; `presets.py` holds the named ones.

The docstrings say what an option does; docs/models.md says what it was measured to be worth.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from polytower.errors import UserError


@dataclass(frozen=True)
class TowersConfig:
    """Shape of both towers.

    family: a name of `families.FAMILIES`; "mmsrec" is one encoder for items and histories, and reads dim, history,
    blocks, heads, residual, feed_forward, dropout and whiten of what follows.
    dim: D, width of the shared space. history: newest events that the user tower reads. blocks, heads: of the
    transformer. residual: "plain" or "gated" (a sigmoid gate on each branch, eSASRec). feed_forward: "gelu" or
    "swiglu". dropout: on the input, attention branch and feed-forward branch. positions: "learned" (added to the input)
    or "rotary" (queries and keys turned by their place). relative: what attention adds to its logits, per head and
    log-spaced bucket: "none", "position" (T5), "time" (between two events) or "both" (HSTU).
    recency: adds Σ λ^(events since) · item to the last state, λ learned: a straight way for the newest items.
    interests: K. extractor: a name of `interests.EXTRACTORS`. adaptive: K_u = clip(log2 |history|, 1, K) (MIND).
    fusion: a name of `fusion.FUSIONS`, or "none"; fusion_queries, fusion_layers: of the Q-Former; content_width: hidden
    width of the fused path; content_dropout: on its features; modality_dropout: share of the items of a step that show
    one of their modalities alone, drawn at random, since a question by text or by picture brings no other. linear: adds
    a linear map of the features, which starts as a ridge regression of the start of the ID embeddings. whiten: rank to
    which each modality's PCA is cut and whitened; 0 takes content as it was encoded.
    content_dim: width of a block for content alone inside dim: item = [√a·ID ; √(1−a)·content]; 0: one space for both.
    id_share: a, learned from there on with learn_id_share. shrinkage: start of the learned number n0 of events at which
    an item's own ID weighs as much as its content: item = normalise(ID + n0/(n + n0)·content), or in blocks
    a·n/(n + n0) for a; 0 leaves content out of warm items, and a as it is. id_dropout: share of the items of a step
    that are taken for cold. cold: what stands for the ID of an item without events: "content" (nothing does), or
    "ridge" (the regression of the trained IDs on the features, `cold.py`). tail_buckets: rows of the ID table
    that items with fewer than tail_below training events share, two hashed ones each; 0 gives every item its own row;
    own_rows: how many have their own then, filled in from the counts. modalities: (name, width) of each,
    by name; filled in from the catalogue.
    contrast_dim: width of the two maps between which the content-ID contrast compares; 0 for no contrast.
    user_attributes: width of the hashed attributes of a user, which are added to the states of the history; 0 leaves
    them out. silent_users: share of the training windows that do without them, as a raw history does when asked.
    pair: how the query of an event joins its item (`pairs.py`): "none" (queries are left out), "mean"
    (α·query + (1−α)·item) or "gated" (α a function of both). pair_share: α, or where its gate starts. query_width:
    hidden width of the map from a query's text embedding; query_dim: width of that, filled in from the histories.
    silent_queries: share of the training positions that are not told what the next event's query is, as a question
    without a text does not.
    """

    family: Literal["towers", "mmsrec"] = "towers"
    dim: int = 64
    history: int = 50
    blocks: int = 1
    heads: int = 2
    residual: Literal["plain", "gated"] = "plain"
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    dropout: float = 0.5
    positions: Literal["learned", "rotary"] = "learned"
    relative: Literal["none", "position", "time", "both"] = "none"
    recency: bool = False
    interests: int = 4
    extractor: str = "heads"
    adaptive: bool = False
    fusion: str = "gated_sum"
    fusion_queries: int = 2
    fusion_layers: int = 1
    content_width: int = 128
    content_dropout: float = 0.2
    modality_dropout: float = 0.2
    linear: bool = False
    whiten: int = 0
    content_dim: int = 0
    id_share: float = 0.5
    learn_id_share: bool = False
    shrinkage: float = 0.0
    id_dropout: float = 0.0
    cold: Literal["content", "ridge"] = "content"
    tail_buckets: int = 0
    tail_below: int = 5
    own_rows: int = 0
    modalities: tuple[tuple[str, int], ...] = ()
    contrast_dim: int = 0
    user_attributes: int = 0
    silent_users: float = 0.2
    pair: Literal["none", "mean", "gated"] = "none"
    pair_share: float = 0.5
    query_width: int = 256
    query_dim: int = 0
    silent_queries: float = 0.3

    @property
    def doubt(self) -> int:
        """Coordinates behind ID and content: where a cold item keeps the length that it does not dare to score by."""
        return 1 if self.cold == "ridge" and self.modalities else 0

    @property
    def id_dim(self) -> int:
        """Width of the ID embedding."""
        return self.dim - (self.content_dim if self.modalities else 0) - self.doubt

    @property
    def features(self) -> tuple[tuple[str, int], ...]:
        """(name, width) of each modality as the content path reads it."""
        return tuple((name, min(self.whiten or size, size)) for name, size in self.modalities)

    @property
    def reads(self) -> tuple[str, ...]:
        """What changes the interests beside the items: fields of `Histories`."""
        wanted = {"times": self.relative in ("time", "both"), "attributes": self.user_attributes > 0}
        wanted |= dict.fromkeys(("queries", "query_vectors"), self.pair != "none")
        return tuple(name for name, read in wanted.items() if read)


@dataclass(frozen=True)
class TrainConfig:
    """How the towers are trained.

    initial: "svd" (PPMI of co-occurrence, randomised SVD) or "normal" ID embeddings; of mmsrec "identity" (items are
    nearly their features, users the mean of theirs) or "normal" weights. smooth_initial: number of events
    at which an item's start weighs as much as what its content predicts of it; 0 for no such smoothing. ridge: strength
    of the regressions on content, as a multiple of the mean weight of an item.
    cold_loss: share of Recall@50 of warm validation items that cold ones may cost: what κ is tuned to; kappa: κ itself,
    None to tune it (.8 where nobody can be asked).
    pretrain_epochs, pretrain_items: passes over the catalogue before all others, and items a step, in which a model
    that knows no ids learns to tell items apart (`contrast.py`). mask_share: share of the events that it has to guess,
    beside the last one of each history.
    unit_epochs: passes of SEMINAR's pretraining before the training (`search_unit.py`), 0 for none; unit_next,
    unit_align, unit_relevance: weights of its losses, 0 for off; unit_temperature: τ of all three; unit_negatives: of
    the last.
    search: validation questions tell the query of their target, so that what is selected is the best at search.
    epochs, batch_rows: passes, and packed rows per step; no epoch serves the start as it is. negatives:
    shared negatives per step, 0 = softmax over the
    whole catalogue; sampling: "uniform", "popularity" (drawn as often as they occur), "in_batch" (the step's own next
    items) or "mixed" (half in-batch, half uniform); logq: subtract the log of the sampling probability. temperature: τ
    of the scores, at least .02.
    windows: what a position is asked for: the next event (empty), or window_targets events, each drawn from the user's
    next w for a w of these. objective: a name of `losses.OBJECTIVES`; repel: of `losses.REPELS`, weighed by
    repel_weight, from repel_margin on.
    routing_weight: of REMI's regulariser, for extractors with attention (comirec_sa, query_tokens; REMI takes 100).
    weight_loss: weight of the cross-entropy that calibrates the interest weights. content_weight, content_temperature:
    of the contrast that teaches the content embeddings; content_ranking: weight of the ranking loss beside it, in which
    a content embedding stands for the next item, at a share content_share of the positions.
    contrast_weight, contrast_temperature: of the contrast between content and ID with towers.contrast_dim (EM3).
    lora_rank: of the adapters through which the encoders of text and pictures are trained too; 0 leaves them as they
    are. lora_layers: adapts the last so many layers of a backbone, 0 all; encoder_rate: their learning rate, as a share
    of learning_rate. encoder_budget: next items a step that are encoded with gradients. delta_rank: of the map that
    stands for the adapter in all other items; delta_weight: of the loss that teaches it to.
    table_optimiser: "dense" (Adam over the whole ID table in every step) or "rowwise" (only the rows that a step
    touches, 8 bytes of state each: for millions of items). learning_rate decays linearly to final_rate of itself. ema:
    decay of the weights' running mean, which is what is evaluated and kept. validate_every: epochs between validations;
    patience: validations without a better NDCG@10 before it stops. threads: torch's own, None decides by size.
    refit: train again on all events, for as many epochs as the best one, after the selection; the metrics stay those
    of the strict model.
    """

    preset: str = "custom"
    towers: TowersConfig = field(default_factory=TowersConfig)
    initial: Literal["svd", "normal", "identity"] = "svd"
    smooth_initial: float = 0.0
    ridge: float = 30.0
    cold_loss: float = 0.02
    kappa: float | None = None
    pretrain_epochs: int = 0
    pretrain_items: int = 512
    mask_share: float = 0.2
    unit_epochs: int = 0
    unit_next: float = 1.0
    unit_align: float = 1.0
    unit_relevance: float = 1.0
    unit_temperature: float = 0.05
    unit_negatives: int = 5
    search: bool = False
    epochs: int = 24
    batch_rows: int = 64
    negatives: int = 2048
    sampling: Literal["uniform", "popularity", "in_batch", "mixed"] = "uniform"
    logq: bool = False
    temperature: float = 0.07
    windows: tuple[int, ...] = ()
    window_targets: int = 4
    objective: str = "consistent"
    repel: str = "none"
    repel_weight: float = 0.0
    repel_margin: float = 0.3
    routing_weight: float = 0.0
    weight_loss: float = 0.1
    content_weight: float = 1.0
    content_temperature: float = 0.07
    content_ranking: float = 1.0
    content_share: float = 0.3
    contrast_weight: float = 1e-3
    contrast_temperature: float = 0.1
    lora_rank: int = 0
    lora_layers: int = 0
    encoder_rate: float = 0.1
    encoder_budget: int = 32
    delta_rank: int = 8
    delta_weight: float = 1.0
    table_optimiser: Literal["dense", "rowwise"] = "dense"
    learning_rate: float = 2e-3
    final_rate: float = 0.02
    weight_decay: float = 0.0
    ema: float = 0.99
    validate_every: int = 2
    patience: int = 4
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    refit: bool = False

    def __post_init__(self) -> None:
        shape = self.towers
        wrong = {
            "temperature": self.temperature < 0.02,
            "epochs": self.epochs < 0,
            "pretrain_epochs": self.pretrain_epochs < 0,
            "pretrain_items (two at least)": self.pretrain_items < 2,
            "mask_share": not 0 <= self.mask_share < 1,
            "unit_epochs": self.unit_epochs < 0,
            "unit_temperature": self.unit_temperature < 0.02,
            "unit_negatives": self.unit_negatives < 1,
            "unit_align (not with blocks, where ID and content share no space)": (
                self.unit_epochs > 0 and self.unit_align > 0 and shape.content_dim > 0
            ),
            "batch_rows": self.batch_rows < 1,
            "negatives": self.negatives < 0,
            "windows": any(window < 1 for window in self.windows),
            "window_targets": self.window_targets < 1,
            "contrast_temperature": self.contrast_temperature < 0.02,
            "lora_rank": self.lora_rank < 0,
            "lora_layers": self.lora_layers < 0,
            "encoder_rate": self.encoder_rate <= 0,
            "encoder_budget": self.encoder_budget < 1,
            "delta_rank": self.delta_rank < 1,
            "towers.contrast_dim": shape.contrast_dim < 0,
            "ema": not 0 <= self.ema < 1,
            "towers.interests": shape.interests < 1,
            "towers.tail_buckets (0, or at least 2)": shape.tail_buckets < 0 or shape.tail_buckets == 1,
            "towers.history": shape.history < 1,
            "towers.dim (a multiple of towers.heads)": shape.dim < 1 or shape.dim % shape.heads != 0,
            "towers.dim (a head has an even width with rotary positions)": (
                shape.positions == "rotary" and shape.dim // shape.heads % 2 != 0
            ),
            "towers.fusion_queries": shape.fusion_queries < 1,
            "towers.fusion_layers": shape.fusion_layers < 1,
            "towers.content_width (a multiple of 4 for the Q-Former)": (
                shape.content_width < 1 or (shape.fusion == "qformer" and shape.content_width % 4 != 0)
            ),
            "towers.content_dim (less than towers.dim)": not 0 <= shape.content_dim < shape.dim - 1,
            "towers.whiten": shape.whiten < 0,
            "towers.id_share": not 0 < shape.id_share < 1,
            "towers.id_dropout": not 0 <= shape.id_dropout < 1,
            "towers.modality_dropout": not 0 <= shape.modality_dropout <= 1,
            "towers.fusion (none needs towers.linear)": shape.fusion == "none" and not shape.linear,
            "towers.dropout": not 0 <= shape.dropout < 1,
            "towers.user_attributes (a multiple of 4)": shape.user_attributes < 0 or shape.user_attributes % 4 != 0,
            "towers.silent_users": not 0 <= shape.silent_users <= 1,
            "towers.silent_queries": not 0 <= shape.silent_queries <= 1,
            "towers.pair_share": not 0 < shape.pair_share < 1,
            "towers.query_width": shape.query_width < 1,
            "towers.pair (not with the extractor towers)": shape.pair != "none" and shape.extractor == "towers",
            "towers.pair (not with lora_rank: queries are read by the encoder as it was)": (
                shape.pair != "none" and self.lora_rank > 0
            ),
        }
        found = [name for name, bad in wrong.items() if bad]
        if found:
            raise UserError(f"configuration: value out of range for {', '.join(found)}")

    @property
    def softness(self) -> float:
        """Of the maximum over the interests that scores an item: the same when evaluated as when trained."""
        return self.temperature if self.objective == "soft_consistent" else 0.0

    def as_json(self) -> dict[str, Any]:
        """A dict that JSON can hold and `config_from_json` reads back."""
        return asdict(self)


def config_from_json(document: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `TrainConfig.as_json`. Raises UserError for a name or a type that this version does not know."""
    inner = towers_from_json(document.get("towers", {}))
    _known(TrainConfig, document)
    return TrainConfig(**{**document, "towers": inner, "windows": tuple(document.get("windows", ()))})


def changed(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some options changed: names of TrainConfig, or of TowersConfig behind "towers.".

    Raises UserError for an unknown name and for a value of another type.
    """
    document = config.as_json()
    for name, value in options.items():
        part, key = (
            (document["towers"], name.removeprefix("towers.")) if name.startswith("towers.") else (document, name)
        )
        kinds = (int, float) if isinstance(part.get(key), int | float) and not isinstance(part[key], bool) else None
        if kinds and not isinstance(value, kinds):
            raise UserError(f"option {name}: {value!r} is not a number")
        part[key] = value
    return config_from_json(document)


def towers_from_json(document: Mapping[str, Any]) -> TowersConfig:
    """TowersConfig from its JSON form. Raises UserError for a name that this version does not know."""
    _known(TowersConfig, document)
    modalities = tuple((str(name), int(width)) for name, width in document.get("modalities", ()))
    return TowersConfig(**{**document, "modalities": modalities})


def _known(kind: type[TrainConfig] | type[TowersConfig], document: Mapping[str, Any]) -> None:
    unknown = set(document) - {one.name for one in fields(kind)}
    if unknown:
        raise UserError(
            f"configuration: unknown option {', '.join(sorted(unknown))}; a newer version wrote it, or it is misspelt "
            f"(options of {kind.__name__}: {', '.join(one.name for one in fields(kind))})"
        )
