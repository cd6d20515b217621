"""The tables as SQLAlchemy sees them: what autogenerate compares the database with.

The DDL that runs is in versions/; a test holds the two equal. Comments live here and in words.py: comments.py writes
them into the database, and docs/reference/tables.md shows them.
"""

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, ExcludeConstraint

from migrations import code_tables
from migrations.declared import ENCODER, NOW, TIME, metadata
from migrations.declared import identity as _identity
from migrations.declared import json as _json
from migrations.declared import time as _time
from migrations.declared import words as _text
from migrations.words import WORDS

__all__ = ["code_tables", "metadata"]

__all__ = ["code_tables", "metadata"]

Table(
    "items",
    metadata,
    Column("item_id", Text, primary_key=True, comment="The source's id, as text."),
    Column("title", Text),
    Column("description", Text),
    Column("image", Text, comment="Name of the picture's file, as the source has it."),
    Column("image_path", Text, comment="Where the load found the picture."),
    Column("image_sha256", Text, comment="Hash of the picture's bytes: another one is encoded again."),
    Column(
        "available",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="Items that are not available are not recommended.",
    ),
    _json("attributes", comment="Text, numbers, true/false or lists of these; filtered by, and encoded as content."),
    _time("updated_at", server_default=NOW, comment="When a load last changed the row."),
    Column("vector", ARRAY(REAL), comment="The user's own embedding of the item, as loaded with --vectors."),
    Column("vector_model", Text, comment="The column and width that the vector came from."),
    CheckConstraint("(vector is null) = (vector_model is null)", name="items_vector_model_check"),
    Index(
        "items_attributes_idx", "attributes", postgresql_using="gin", postgresql_ops={"attributes": "jsonb_path_ops"}
    ),
    Index("items_unavailable_idx", "item_id", postgresql_where=text("not available")),
    comment="What can be recommended. `attributes` holds every further column of the source.",
)

Table(
    "users",
    metadata,
    Column("user_id", Text, primary_key=True, comment="The source's id, as text."),
    _json("attributes"),
    _time("updated_at", server_default=NOW, comment="When a load last changed the row."),
    comment="Attributes of users, where the source brings any.",
)

interaction_position = Sequence("interaction_position", metadata=metadata)
Table(
    "interactions",
    metadata,
    _text("user_id"),
    _text("item_id"),
    _time("occurred_at", comment="When it happened, to the microsecond."),
    _text("kind", server_default=text("'interaction'"), comment="Free text, such as view or purchase."),
    _text(
        "event_id",
        server_default=text("''"),
        comment="The source's id of the event, or a hash of the query: makes a replay safe.",
    ),
    Column("value", Double, comment="A number of the source's, such as a rating or a price."),
    Column("query", Text, comment="What was searched for."),
    Column(
        "position",
        BigInteger,
        nullable=False,
        server_default=interaction_position.next_value(),
        comment="The source's order of events at the same instant.",
    ),
    PrimaryKeyConstraint("user_id", "occurred_at", "item_id", "kind", "event_id", name="interactions_pkey"),
    Index("interactions_position_idx", "position"),
    Index("interactions_item_idx", "item_id"),
    Index("interactions_event_idx", "event_id", postgresql_where=text("event_id <> ''")),
    postgresql_partition_by="range (occurred_at)",
    comment="One event a row, partitioned by year. A user's order is (occurred_at, position).",
)

Table(
    "changed_days",
    metadata,
    Column("day", Date, nullable=False),
    comment="Journal of days whose interactions changed since sequences and statistics were refreshed.",
)

Table(
    "user_sequences",
    metadata,
    _text("user_id"),
    Column("day", Date, nullable=False),
    _time("as_of", comment="Time of the last event of the day: from then on the row is true."),
    Column("item_ids", ARRAY(Text), nullable=False, comment="Items of the newest events, oldest first."),
    Column("occurred_ats", ARRAY(TIME), nullable=False, comment="Their times."),
    Column("kinds", ARRAY(Text), nullable=False, comment="Their kinds."),
    Column(
        "queries",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'::text[]"),
        comment="What was searched for (its first 200 characters), '' for nothing; empty where no event has any.",
    ),
    PrimaryKeyConstraint("user_id", "day"),
    Index("user_sequences_as_of_idx", "user_id", text("as_of desc")),
    Index("user_sequences_day_idx", "day"),
    comment="A user's newest events at the end of each active day; the newest row is the online feature.",
)

for article, entity, distinct in (("A", "user", "distinct_items"), ("An", "item", "distinct_users")):
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
        comment=f"{article} {entity}'s running totals at the end of each active day.",
    )

Table(
    "content_encoders",
    metadata,
    _text("modality"),
    _text("revision", comment="Stands for model and configuration: another one means other vectors."),
    _text("model", comment="Name of the model."),
    Column("dim", Integer, CheckConstraint("dim > 0"), nullable=False, comment="Width of its vectors."),
    _json("config"),
    Column(
        "active",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="Whether it is the one in force for its modality.",
    ),
    _time("created_at", server_default=NOW),
    PrimaryKeyConstraint("modality", "revision"),
    Index("content_encoders_active_idx", "modality", unique=True, postgresql_where=text("active")),
    comment="Encoder revisions; at most one per modality is active.",
)

Table(
    "content_embeddings",
    metadata,
    _text("item_id"),
    _text("modality"),
    _text("revision"),
    _text("content_hash", comment="Hash of what was encoded: a changed item is encoded again."),
    Column("embedding", HALFVEC, nullable=False, comment="Unit vector of 16-bit floats."),
    _time("encoded_at", server_default=NOW),
    PrimaryKeyConstraint("item_id", "modality", "revision"),
    ForeignKeyConstraint(["modality", "revision"], ENCODER),
    comment="What an item is: one unit vector per item, modality and encoder revision.",
)

Table(
    "query_embeddings",
    metadata,
    _text("modality", server_default=text("'text'::text")),
    _text("revision"),
    _text("query_key", comment="The function query_key of the query: each distinct text is encoded once."),
    Column("embedding", HALFVEC, nullable=False, comment="Unit vector of 16-bit floats."),
    _time("encoded_at", server_default=NOW),
    PrimaryKeyConstraint("revision", "query_key"),
    ForeignKeyConstraint(["modality", "revision"], ENCODER),
    comment="What users searched for, by the text encoder: one unit vector for each distinct query.",
)

Table(
    "generations",
    metadata,
    _identity("generation"),
    _text(
        "state",
        server_default=text("'building'"),
        comment="building, ready, live, retired or failed; at most one is live.",
    ),
    Column("dim", Integer, CheckConstraint("dim between 1 and 4000"), nullable=False, comment="Width of its vectors."),
    Column(
        "interests", Integer, CheckConstraint("interests > 0"), nullable=False, comment="Interests of a user, at most."
    ),
    _json("config", comment="Preset and options of the training behind it."),
    _json("metrics", comment="What the offline evaluation measured."),
    _json("quality", comment="Report of the gates that promotion looks at, and the tuned search depth."),
    Column("checkpoint_path", Text, comment="Folder of the checkpoint that it was built from."),
    Column("checkpoint_sha256", Text),
    _time("created_at", server_default=NOW),
    Column("ready_at", TIME),
    Column("live_at", TIME),
    Column("retired_at", TIME),
    Column("trained_before", TIME, comment="It knows no event at or after this moment; null: all there were."),
    Index("generations_live_idx", "state", unique=True, postgresql_where=text("state = 'live'")),
    comment="Immutable bundles of embeddings and towers: building, ready, live, retired or failed.",
)

Table(
    "promotions",
    metadata,
    _identity("promotion"),
    Column("generation", BigInteger, ForeignKey("generations.generation"), nullable=False),
    _time("live_from", server_default=text("clock_timestamp()"), comment="From when on."),
    Column("live_until", TIME, comment="Until when; null while it is live."),
    ExcludeConstraint(
        (func.tstzrange(text("live_from"), text("live_until")), "&&"), name="promotions_no_overlap", using="gist"
    ),
    comment="When each generation was live; intervals never overlap.",
)

Table(
    "towers",
    metadata,
    Column("generation", BigInteger, ForeignKey("generations.generation", ondelete="CASCADE"), nullable=False),
    _text("part", comment="user_tower, content, or adapter_ and the modality whose encoder was trained."),
    Column("weights", LargeBinary, nullable=False, comment="The tower as safetensors."),
    Column("config", JSONB, nullable=False),
    PrimaryKeyConstraint("generation", "part"),
    comment="Exported towers (safetensors) that belong to a generation.",
)

Table(
    "item_embeddings",
    metadata,
    Column("generation", BigInteger, nullable=False),
    _text("item_id"),
    Column(
        "embedding",
        HALFVEC,
        nullable=False,
        comment="What users' interests are matched with: content and behaviour fused.",
    ),
    Column("content_embedding", HALFVEC, comment="What the item is: works for an item that nobody has touched."),
    Column("id_embedding", HALFVEC, comment="What behaviour taught about it; null for an item without interactions."),
    PrimaryKeyConstraint("generation", "item_id", name="item_embeddings_pkey"),
    CheckConstraint(
        "l2_norm(embedding) between 0.99 and 1.01 and l2_norm(content_embedding) between 0.99 and 1.01"
        " and l2_norm(id_embedding) between 0.99 and 1.01",
        name="item_embeddings_unit_check",
    ),
    Index("item_embeddings_item_idx", "item_id", postgresql_using="hash"),
    postgresql_partition_by="list (generation)",
    comment="Item, content and ID embedding of every item, partitioned by generation.",
)

Table(
    "user_interests",
    metadata,
    Column("generation", BigInteger, nullable=False),
    _text("user_id"),
    Column("interest", SmallInteger, nullable=False, comment="Number of the interest, from 0."),
    Column("embedding", HALFVEC, nullable=False, comment="Unit vector in the space of items."),
    Column("weight", REAL, nullable=False, comment="Its share of the user's taste."),
    _time("as_of", comment="Time of the newest event that it knows; 1970 for a user known by attributes alone."),
    Column("events", BigInteger, comment="How many of the user's events it knows; whatever is beyond these is news."),
    PrimaryKeyConstraint("generation", "user_id", "interest", name="user_interests_pkey"),
    CheckConstraint("l2_norm(embedding) between 0.99 and 1.01", name="user_interests_unit_check"),
    CheckConstraint("weight >= 0 and weight <= 1.001::real", name="user_interests_weight_check"),
    postgresql_partition_by="list (generation)",
    comment="K interests of every user with their weights, partitioned by generation.",
)

Table(
    "loads",
    metadata,
    _identity("load_id"),
    _text("source", comment="Folder that was loaded."),
    _text("state", server_default=text("'running'"), comment="running, done or failed."),
    _json("counts", comment="Rows by table and by what became of them."),
    _time("started_at", server_default=NOW),
    Column("finished_at", TIME),
    comment="Every load: its source, its counts, how it ended.",
)

Table(
    "rejected_rows",
    metadata,
    Column("load_id", BigInteger, ForeignKey("loads.load_id", ondelete="CASCADE"), nullable=False),
    _text("file"),
    Column("row_number", BigInteger, nullable=False, comment="Number of the row within the file, from 1."),
    Column("column_name", Text, comment="The column at fault, where it is one."),
    _text("reason", comment="What is wrong with it."),
    Column("value", Text, comment="The value at fault, cut."),
    Index("rejected_rows_load_idx", "load_id"),
    comment="Rows that a load put aside, with file, row number, column and reason.",
)

Table(
    "forgotten",
    metadata,
    _text("entity", comment="user or item."),
    Column("digest", LargeBinary, nullable=False, comment="SHA-256 of the id: the list names nobody."),
    _time("forgotten_at", server_default=NOW, comment="A user's events up to then are not taken again."),
    PrimaryKeyConstraint("entity", "digest", name="forgotten_pkey"),
    comment="Users and items that were erased: loads and posts leave them out.",
)

Table(
    "item_version",
    metadata,
    Column("only_row", Boolean, CheckConstraint("only_row"), primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False),
    comment="One row, counted up by every change of items: tells an index in memory that it is old.",
)

Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True, comment="Public part of the key."),
    _text("name"),
    Column("hash", LargeBinary, nullable=False, comment="SHA-256 of the key."),
    Column(
        "scopes", ARRAY(Text), nullable=False, comment="What it is good for: read, write or admin, which includes both."
    ),
    Column("rate", Double, comment="Requests a second; null without a limit."),
    Column("burst", Integer, nullable=False, comment="Requests at once."),
    _time("created_at", server_default=NOW),
    Column("last_used_at", TIME),
    Column("revoked_at", TIME),
    Index("api_keys_hash_idx", "hash", unique=True),
    comment="Who may ask the HTTP API: hashes of keys, never a key. Analysts cannot read it.",
)

for _table in metadata.tables.values():
    for _column in _table.columns:
        _column.comment = _column.comment or WORDS.get(_column.name)
