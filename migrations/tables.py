"""The tables as SQLAlchemy sees them: what autogenerate compares the database with.

The DDL that runs is in versions/. A test holds the two equal.
"""

from typing import Any

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, ExcludeConstraint

metadata = MetaData()

TIME = DateTime(timezone=True)
NOW = text("now()")
EMPTY = text("'{}'::jsonb")


def _text(name: str, **options: Any) -> Column[str]:
    return Column(name, Text, nullable=False, **options)


def _json(name: str) -> Column[Any]:
    return Column(name, JSONB, nullable=False, server_default=EMPTY)


def _time(name: str, **options: Any) -> Column[Any]:
    return Column(name, TIME, nullable=False, **options)


def _identity(name: str) -> Column[int]:
    return Column(name, BigInteger, primary_key=True)


Table(
    "items",
    metadata,
    Column("item_id", Text, primary_key=True),
    Column("title", Text),
    Column("description", Text),
    Column("image", Text),
    Column("image_path", Text),
    Column("image_sha256", Text),
    Column("available", Boolean, nullable=False, server_default=text("true")),
    _json("attributes"),
    _time("updated_at", server_default=NOW),
    Column("vector", ARRAY(REAL)),
    Column("vector_model", Text),
    CheckConstraint("(vector is null) = (vector_model is null)", name="items_vector_model_check"),
    Index(
        "items_attributes_idx", "attributes", postgresql_using="gin", postgresql_ops={"attributes": "jsonb_path_ops"}
    ),
    Index("items_unavailable_idx", "item_id", postgresql_where=text("not available")),
)

Table(
    "users",
    metadata,
    Column("user_id", Text, primary_key=True),
    _json("attributes"),
    _time("updated_at", server_default=NOW),
)

interaction_position = Sequence("interaction_position", metadata=metadata)
Table(
    "interactions",
    metadata,
    _text("user_id"),
    _text("item_id"),
    _time("occurred_at"),
    _text("kind", server_default=text("'interaction'")),
    _text("event_id", server_default=text("''")),
    Column("value", Double),
    Column("query", Text),
    Column("position", BigInteger, nullable=False, server_default=interaction_position.next_value()),
    PrimaryKeyConstraint("user_id", "occurred_at", "item_id", "kind", "event_id", name="interactions_pkey"),
    Index("interactions_position_idx", "position"),
    Index("interactions_item_idx", "item_id"),
    Index("interactions_event_idx", "event_id", postgresql_where=text("event_id <> ''")),
    postgresql_partition_by="range (occurred_at)",
)

Table("changed_days", metadata, Column("day", Date, nullable=False))

Table(
    "user_sequences",
    metadata,
    _text("user_id"),
    Column("day", Date, nullable=False),
    _time("as_of"),
    Column("item_ids", ARRAY(Text), nullable=False),
    Column("occurred_ats", ARRAY(TIME), nullable=False),
    Column("kinds", ARRAY(Text), nullable=False),
    PrimaryKeyConstraint("user_id", "day"),
    Index("user_sequences_as_of_idx", "user_id", text("as_of desc")),
    Index("user_sequences_day_idx", "day"),
)

for entity, distinct in (("user", "distinct_items"), ("item", "distinct_users")):
    Table(
        f"{entity}_stats",
        metadata,
        _text(f"{entity}_id"),
        Column("day", Date, nullable=False),
        _time("as_of"),
        Column("interactions", BigInteger, nullable=False),
        Column(distinct, BigInteger, nullable=False),
        Column("mean_value", Double),
        _time("first_at"),
        PrimaryKeyConstraint(f"{entity}_id", "day"),
        Index(f"{entity}_stats_as_of_idx", f"{entity}_id", text("as_of desc")),
        Index(f"{entity}_stats_day_idx", "day"),
    )

Table(
    "content_encoders",
    metadata,
    _text("modality"),
    _text("revision"),
    _text("model"),
    Column("dim", Integer, CheckConstraint("dim > 0"), nullable=False),
    _json("config"),
    Column("active", Boolean, nullable=False, server_default=text("false")),
    _time("created_at", server_default=NOW),
    PrimaryKeyConstraint("modality", "revision"),
    Index("content_encoders_active_idx", "modality", unique=True, postgresql_where=text("active")),
)

ENCODER = ["content_encoders.modality", "content_encoders.revision"]

Table(
    "content_embeddings",
    metadata,
    _text("item_id"),
    _text("modality"),
    _text("revision"),
    _text("content_hash"),
    Column("embedding", HALFVEC, nullable=False),
    _time("encoded_at", server_default=NOW),
    PrimaryKeyConstraint("item_id", "modality", "revision"),
    ForeignKeyConstraint(["modality", "revision"], ENCODER),
)

Table(
    "codebooks",
    metadata,
    _identity("codebook_id"),
    _text("modality"),
    _text("revision"),
    Column("subspaces", Integer, CheckConstraint("subspaces > 0"), nullable=False),
    Column("centroids", ARRAY(REAL), nullable=False),
    _time("created_at", server_default=NOW),
    ForeignKeyConstraint(["modality", "revision"], ENCODER),
)

Table(
    "content_codes",
    metadata,
    Column("codebook_id", BigInteger, ForeignKey("codebooks.codebook_id", ondelete="CASCADE"), nullable=False),
    _text("item_id"),
    Column("codes", LargeBinary, nullable=False),
    PrimaryKeyConstraint("codebook_id", "item_id"),
)

Table(
    "generations",
    metadata,
    _identity("generation"),
    _text("state", server_default=text("'building'")),
    Column("dim", Integer, CheckConstraint("dim between 1 and 4000"), nullable=False),
    Column("interests", Integer, CheckConstraint("interests > 0"), nullable=False),
    _json("config"),
    _json("metrics"),
    _json("quality"),
    Column("checkpoint_path", Text),
    Column("checkpoint_sha256", Text),
    _time("created_at", server_default=NOW),
    Column("ready_at", TIME),
    Column("live_at", TIME),
    Column("retired_at", TIME),
    Index("generations_live_idx", "state", unique=True, postgresql_where=text("state = 'live'")),
)

Table(
    "promotions",
    metadata,
    _identity("promotion"),
    Column("generation", BigInteger, ForeignKey("generations.generation"), nullable=False),
    _time("live_from", server_default=text("clock_timestamp()")),
    Column("live_until", TIME),
    ExcludeConstraint(
        (func.tstzrange(text("live_from"), text("live_until")), "&&"), name="promotions_no_overlap", using="gist"
    ),
)

Table(
    "towers",
    metadata,
    Column("generation", BigInteger, ForeignKey("generations.generation", ondelete="CASCADE"), nullable=False),
    _text("part"),
    Column("weights", LargeBinary, nullable=False),
    Column("config", JSONB, nullable=False),
    PrimaryKeyConstraint("generation", "part"),
)

Table(
    "item_embeddings",
    metadata,
    Column("generation", BigInteger, nullable=False),
    _text("item_id"),
    Column("embedding", HALFVEC, nullable=False),
    Column("content_embedding", HALFVEC),
    Column("id_embedding", HALFVEC),
    PrimaryKeyConstraint("generation", "item_id", name="item_embeddings_pkey"),
    Index("item_embeddings_item_idx", "item_id", postgresql_using="hash"),
    postgresql_partition_by="list (generation)",
)

Table(
    "user_interests",
    metadata,
    Column("generation", BigInteger, nullable=False),
    _text("user_id"),
    Column("interest", SmallInteger, nullable=False),
    Column("embedding", HALFVEC, nullable=False),
    Column("weight", REAL, nullable=False),
    _time("as_of"),
    Column("events", BigInteger),
    PrimaryKeyConstraint("generation", "user_id", "interest", name="user_interests_pkey"),
    postgresql_partition_by="list (generation)",
)

Table(
    "loads",
    metadata,
    _identity("load_id"),
    _text("source"),
    _text("state", server_default=text("'running'")),
    _json("counts"),
    _time("started_at", server_default=NOW),
    Column("finished_at", TIME),
)

Table(
    "rejected_rows",
    metadata,
    Column("load_id", BigInteger, ForeignKey("loads.load_id", ondelete="CASCADE"), nullable=False),
    _text("file"),
    Column("row_number", BigInteger, nullable=False),
    Column("column_name", Text),
    _text("reason"),
    Column("value", Text),
    Index("rejected_rows_load_idx", "load_id"),
)

Table(
    "item_version",
    metadata,
    Column("only_row", Boolean, CheckConstraint("only_row"), primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False),
)

Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    _text("name"),
    Column("hash", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("rate", Double),
    Column("burst", Integer, nullable=False),
    _time("created_at", server_default=NOW),
    Column("last_used_at", TIME),
    Column("revoked_at", TIME),
    Index("api_keys_hash_idx", "hash", unique=True),
)
