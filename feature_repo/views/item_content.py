"""The content embeddings of an item: one feature per modality, made of the records in feature_repo/modalities.py."""

from psycopg import sql

from feature_repo.modalities import MODALITIES
from feature_repo.schema import ITEM, RANKER_SERVICE
from feature_repo.views.view import Feature, Rows, View

_EMBEDDINGS = sql.SQL(", ").join(
    sql.SQL("(array_agg(embedding) filter (where modality = {}))[1] as {}").format(
        one.name, sql.Identifier(one.feature)
    )
    for one in MODALITIES.values()
)
_ROW = sql.SQL(
    "select max(encoded_at) as as_of, {embeddings} from polytower.content_embeddings "
    "join polytower.content_encoders using (modality, revision) where active and item_id = wanted.item_id "
    "having {there}"
)
_NOW = _ROW.format(embeddings=_EMBEDDINGS, there=sql.SQL("count(*) > 0")).as_string()

VIEW = View(
    name="item_content",
    entity=ITEM,
    description="Content embeddings by the active encoder of each modality",
    services=(RANKER_SERVICE,),
    rows=Rows(
        now=_NOW,
        before=_ROW.format(embeddings=_EMBEDDINGS, there=sql.SQL("max(encoded_at) <= wanted.moment")).as_string(),
        backfilled=_NOW,
    ),
    features=tuple(Feature(one.feature, "halves") for one in MODALITIES.values()),
)
