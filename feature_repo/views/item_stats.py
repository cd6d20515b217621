"""What can be counted about an item."""

from feature_repo.schema import ITEM, ITEM_ID, RANKER_SERVICE
from feature_repo.views.view import Feature, Table, View, newest_day

VIEW = View(
    name="item_stats",
    entity=ITEM,
    description="Counts over all interactions with an item so far",
    services=(RANKER_SERVICE,),
    rows=newest_day("item_stats", ITEM_ID),
    features=(
        Feature("item_interactions", "integer", "interactions"),
        Feature("item_distinct_users", "integer", "distinct_users"),
        Feature("item_mean_value", "number", "mean_value"),
        Feature("item_first_at", "moment", "first_at", "microseconds since 1970"),
    ),
    table=Table("item_stats"),
)
