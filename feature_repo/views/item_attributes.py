"""What the source says about an item."""

from feature_repo.schema import ITEM, RANKER_SERVICE
from feature_repo.views.view import Feature, Rows, Table, View

VIEW = View(
    name="item_attributes",
    entity=ITEM,
    description="What the source says about an item",
    services=(RANKER_SERVICE,),
    rows=Rows(
        now="select *, updated_at as as_of from polytower.items where item_id = wanted.item_id",
        before="select * from polytower.items where item_id = wanted.item_id and updated_at <= wanted.moment",
        backfilled="select * from polytower.items where item_id = wanted.item_id",
    ),
    features=(
        Feature("title", "text"),
        Feature("description", "text"),
        Feature("available", "flag"),
        Feature("attributes", "json", description="a JSON object"),
    ),
    # Columns that Feast does not know (an item's image, path, checksum) keep what the loader wrote.
    table=Table("items", daily=False, as_of="updated_at"),
)
