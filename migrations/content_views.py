"""The views with one column per modality: a modality that is new to the code needs no revision of its own.

Columns are only added, after those that are there: `create or replace view` wants it so, and what read them goes on.
"""

from psycopg import sql
from sqlalchemy import Connection, text

from feature_repo.modalities import MODALITIES

COLUMNS = """
select attname::text from pg_attribute where attrelid = to_regclass('feast.item_content') and attnum > 2 order by attnum
"""
_WIDE = sql.SQL("""create or replace view polytower.item_content as
select item_id, max(encoded_at) as encoded_at, {columns}
from polytower.content_embeddings join polytower.content_encoders using (modality, revision)
where active group by item_id""")
_FEAST = sql.SQL("""create or replace view feast.item_content as
select item_id, encoded_at as as_of, {columns} from polytower.item_content""")
_COLUMN = sql.SQL("(array_agg(embedding) filter (where modality = {name}))[1] as {feature}")
_SUFFIX = "_embedding"


def missing(columns: list[str]) -> list[str]:
    """The features of modalities that a view with these columns lacks."""
    return [one.feature for one in MODALITIES.values() if one.feature not in columns]


def refresh(connection: Connection) -> None:
    """Adds the columns of modalities that came since the views were made."""
    there = list(connection.scalars(text(COLUMNS)))
    if not missing(there):
        return
    features = [*there, *missing(there)]
    wide = [
        _COLUMN.format(name=sql.Literal(feature.removesuffix(_SUFFIX)), feature=sql.Identifier(feature))
        for feature in features
    ]
    lists = [sql.SQL("{0}::real[] as {0}").format(sql.Identifier(feature)) for feature in features]
    for view, columns in ((_WIDE, wide), (_FEAST, lists)):
        connection.exec_driver_sql(view.format(columns=sql.SQL(", ").join(columns)).as_string())
