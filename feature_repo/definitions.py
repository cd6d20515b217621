"""All Feast objects, made of the declarations in views/: entities, sources, feature views, services.

Feast finds objects by looking at this module's names: one that sits only inside a list or a dictionary does not exist
for it. No view has a time to live: the newest row holds until a newer one comes.
"""

from feast import Entity, FeatureService, FeatureView, Field, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Array, Bool, FeastType, Float32, Float64, Int64, String

from feature_repo.columns import Kind
from feature_repo.schema import FEAST_SCHEMA, ITEM, ITEM_ID, SERVICES, USER, USER_ID
from feature_repo.views import VIEWS, views_of
from feature_repo.views.view import View

DTYPES: dict[Kind, FeastType] = {
    "text": String,
    "json": String,
    "integer": Int64,
    "moment": Int64,
    "number": Float64,
    "flag": Bool,
    "texts": Array(String),
    "reals": Array(Float32),
    "halves": Array(Float32),
    "moments": Array(Int64),
}

user = Entity(name=USER, join_keys=[USER_ID], value_type=ValueType.STRING, description="Who acts")
item = Entity(name=ITEM, join_keys=[ITEM_ID], value_type=ValueType.STRING, description="What is recommended")
_ENTITIES = {USER: user, ITEM: item}


def _view(view: View) -> FeatureView:
    """Its source is the SQL view of the same name in Feast's schema, which the migrations make."""
    return FeatureView(
        name=view.name,
        entities=[_ENTITIES[view.entity]],
        source=PostgreSQLSource(name=view.name, table=f"{FEAST_SCHEMA}.{view.name}", timestamp_field="as_of"),
        description=view.description,
        schema=[
            Field(name=view.key, dtype=String),
            *(Field(name=each.name, dtype=DTYPES[each.kind], description=each.description) for each in view.features),
        ],
    )


FEATURE_VIEWS = {name: _view(view) for name, view in VIEWS.items()}
FEATURE_SERVICES = {
    name: FeatureService(
        name=name, features=[FEATURE_VIEWS[view.name] for view in views_of(name)], description=description
    )
    for name, description in SERVICES.items()
}
# Each under its own name too, for Feast.
globals().update(FEATURE_VIEWS | FEATURE_SERVICES)
