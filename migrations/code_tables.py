"""The tables of content codes, as tables.py declares the others."""

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from migrations.declared import ENCODER, NOW, identity, json, metadata, time, words

Table(
    "code_sets",
    metadata,
    identity("code_set"),
    Column(
        "revisions",
        JSONB,
        nullable=False,
        comment="Encoder revisions in force when it was made; with others in force it is stale, and refused.",
    ),
    Column("weights", JSONB, nullable=False, comment="Weight of each modality in a score."),
    Column(
        "trained_on",
        BigInteger,
        CheckConstraint("trained_on > 0"),
        nullable=False,
        comment="Items with content when it was made.",
    ),
    Column(
        "dim", Integer, CheckConstraint("dim > 0"), nullable=False, comment="Width of the space that modalities share."
    ),
    Column("levels", Integer, CheckConstraint("levels > 0"), nullable=False, comment="Numbers of a semantic ID."),
    Column("residual_centroids", ARRAY(REAL), nullable=False, comment="levels x centroids x dim, row by row."),
    json("metrics", comment="What coding lost, and how many items have codes."),
    Column(
        "active",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Whether it is the one in force; at most one is.",
    ),
    time("created_at", server_default=NOW),
    Index("code_sets_active_idx", "active", unique=True, postgresql_where=text("active")),
    comment="Codebooks of all modalities over one space, made and replaced together.",
)

Table(
    "codebooks",
    metadata,
    identity("codebook_id"),
    Column("code_set", BigInteger, ForeignKey("code_sets.code_set", ondelete="CASCADE"), nullable=False),
    words("modality"),
    words("revision"),
    Column("mean", ARRAY(REAL), nullable=False, comment="Taken off a content embedding first."),
    Column(
        "directions",
        ARRAY(REAL),
        nullable=False,
        comment="width of the embedding x dim, row by row: maps it to the shared space, to a unit vector there.",
    ),
    Column("subspaces", Integer, CheckConstraint("subspaces > 0"), nullable=False, comment="Bytes of a code."),
    Column("centroids", ARRAY(REAL), nullable=False, comment="subspaces x centroids x (dim / subspaces), row by row."),
    UniqueConstraint("code_set", "modality"),
    ForeignKeyConstraint(["modality", "revision"], ENCODER),
    comment="Product-quantisation centroids of one modality in a set.",
)

Table(
    "content_codes",
    metadata,
    Column("codebook_id", BigInteger, ForeignKey("codebooks.codebook_id", ondelete="CASCADE"), nullable=False),
    words("item_id"),
    Column("codes", LargeBinary, nullable=False, comment="One byte for each sub-space: the number of a centroid."),
    time("encoded_at", comment="When the embedding was made that is coded."),
    PrimaryKeyConstraint("codebook_id", "item_id"),
    comment="Content embeddings as codes of a codebook.",
)

Table(
    "semantic_ids",
    metadata,
    Column("code_set", BigInteger, ForeignKey("code_sets.code_set", ondelete="CASCADE"), nullable=False),
    words("item_id"),
    Column("semantic_id", ARRAY(SmallInteger), nullable=False, comment="One number a level, the coarsest first."),
    PrimaryKeyConstraint("code_set", "item_id"),
    comment="Items as few numbers: residual codes of their fused content; equal beginnings mean similar items.",
)
