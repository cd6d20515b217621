"""The towers' embeddings of an item."""

from feature_repo.schema import ITEM, RANKER_SERVICE
from feature_repo.views.view import Feature, Rows, View

VIEW = View(
    name="item_embedding",
    entity=ITEM,
    description="The towers' three embeddings of an item in the generation that was live",
    services=(RANKER_SERVICE,),
    rows=Rows(
        now="""
        select *, (select live_from from polytower.promotions where live_until is null) as as_of
        from polytower.item_embeddings
        where item_id = wanted.item_id and generation = (select generation from polytower.live_generation)
        """,
        before="""
        select item_embeddings.*
        from polytower.promotions
        join polytower.item_embeddings using (generation)
        where live_from <= wanted.moment and (live_until is null or wanted.moment < live_until)
          and item_id = wanted.item_id
        """,
        backfilled="""
        select item_embeddings.*
        from (select polytower.trained_generation(wanted.moment) as generation) as past
        join polytower.item_embeddings using (generation)
        where item_id = wanted.item_id
        """,
    ),
    features=(
        Feature("embedding", "halves"),
        Feature("content_embedding", "halves"),
        Feature("id_embedding", "halves"),
        Feature("embedding_generation", "integer", "generation"),
    ),
)
