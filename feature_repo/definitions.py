"""All Feast objects: entities, sources, feature views, services.

Feast finds objects by looking at this module's names: one that sits only inside a list does not exist for it.
Times inside features are microseconds since 1970; embeddings are unit vectors. No view has a time to live: the newest
row holds until a newer one comes.
"""

from feast import Entity, FeatureService, FeatureView, Field, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Array, Bool, Float32, Float64, Int64, String

from feature_repo.modalities import MODALITIES
from feature_repo.schema import (
    FEAST_SCHEMA,
    ITEM,
    ITEM_ATTRIBUTES_VIEW,
    ITEM_CONTENT_VIEW,
    ITEM_EMBEDDING_VIEW,
    ITEM_ID,
    ITEM_STATS_VIEW,
    RANKER_SERVICE,
    RETRIEVAL_SERVICE,
    SERVICES,
    USER,
    USER_ID,
    USER_INTERESTS_VIEW,
    USER_SEQUENCE_VIEW,
    USER_STATS_VIEW,
)

user = Entity(name=USER, join_keys=[USER_ID], value_type=ValueType.STRING, description="Who acts")
item = Entity(name=ITEM, join_keys=[ITEM_ID], value_type=ValueType.STRING, description="What is recommended")


def _source(view: str) -> PostgreSQLSource:
    """The SQL view of the same name in Feast's schema (migrations/versions/0062_views.py)."""
    return PostgreSQLSource(name=view, table=f"{FEAST_SCHEMA}.{view}", timestamp_field="as_of")


user_sequence = FeatureView(
    name=USER_SEQUENCE_VIEW,
    entities=[user],
    source=_source(USER_SEQUENCE_VIEW),
    description="The newest interactions of a user, oldest first; one row per user and day with activity",
    schema=[
        Field(name=USER_ID, dtype=String),
        Field(name="item_ids", dtype=Array(String)),
        Field(name="occurred_ats", dtype=Array(Int64), description="microseconds since 1970"),
        Field(name="kinds", dtype=Array(String)),
        Field(
            name="queries",
            dtype=Array(String),
            description="what was searched for, '' for nothing; empty where no event has any",
        ),
    ],
)

user_interests = FeatureView(
    name=USER_INTERESTS_VIEW,
    entities=[user],
    source=_source(USER_INTERESTS_VIEW),
    description="The K interests of a user in the generation that was live",
    schema=[
        Field(name=USER_ID, dtype=String),
        Field(name="interests", dtype=Array(Float32), description="K x D unit vectors, flattened row by row"),
        Field(name="interest_weights", dtype=Array(Float32), description="K shares that sum to 1"),
        Field(name="interest_count", dtype=Int64, description="K"),
        Field(name="interest_dim", dtype=Int64, description="D"),
        Field(name="interests_generation", dtype=Int64),
    ],
)

user_stats = FeatureView(
    name=USER_STATS_VIEW,
    entities=[user],
    source=_source(USER_STATS_VIEW),
    description="Counts over all interactions of a user so far",
    schema=[
        Field(name=USER_ID, dtype=String),
        Field(name="user_interactions", dtype=Int64),
        Field(name="user_distinct_items", dtype=Int64),
        Field(name="user_mean_value", dtype=Float64),
        Field(name="user_first_at", dtype=Int64, description="microseconds since 1970"),
    ],
)

item_attributes = FeatureView(
    name=ITEM_ATTRIBUTES_VIEW,
    entities=[item],
    source=_source(ITEM_ATTRIBUTES_VIEW),
    description="What the source says about an item",
    schema=[
        Field(name=ITEM_ID, dtype=String),
        Field(name="title", dtype=String),
        Field(name="description", dtype=String),
        Field(name="available", dtype=Bool),
        Field(name="attributes", dtype=String, description="a JSON object"),
    ],
)

item_content = FeatureView(
    name=ITEM_CONTENT_VIEW,
    entities=[item],
    source=_source(ITEM_CONTENT_VIEW),
    description="Content embeddings by the active encoder of each modality",
    schema=[
        Field(name=ITEM_ID, dtype=String),
        *(Field(name=modality.feature, dtype=Array(Float32)) for modality in MODALITIES.values()),
    ],
)

item_embedding = FeatureView(
    name=ITEM_EMBEDDING_VIEW,
    entities=[item],
    source=_source(ITEM_EMBEDDING_VIEW),
    description="The towers' three embeddings of an item in the generation that was live",
    schema=[
        Field(name=ITEM_ID, dtype=String),
        Field(name="embedding", dtype=Array(Float32)),
        Field(name="content_embedding", dtype=Array(Float32)),
        Field(name="id_embedding", dtype=Array(Float32)),
        Field(name="embedding_generation", dtype=Int64),
    ],
)

item_stats = FeatureView(
    name=ITEM_STATS_VIEW,
    entities=[item],
    source=_source(ITEM_STATS_VIEW),
    description="Counts over all interactions with an item so far",
    schema=[
        Field(name=ITEM_ID, dtype=String),
        Field(name="item_interactions", dtype=Int64),
        Field(name="item_distinct_users", dtype=Int64),
        Field(name="item_mean_value", dtype=Float64),
        Field(name="item_first_at", dtype=Int64, description="microseconds since 1970"),
    ],
)

_VIEWS = {view.name: view for view in list(vars().values()) if isinstance(view, FeatureView)}

retrieval = FeatureService(
    name=RETRIEVAL_SERVICE,
    features=[_VIEWS[name] for name in SERVICES[RETRIEVAL_SERVICE]],
    description="What finds candidates for a user",
)

ranker = FeatureService(
    name=RANKER_SERVICE,
    features=[_VIEWS[name] for name in SERVICES[RANKER_SERVICE]],
    description="What orders the candidates: users and items side by side",
)
