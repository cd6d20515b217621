"""What can be counted about a user."""

from feature_repo.schema import RANKER_SERVICE, USER, USER_ID
from feature_repo.views.view import Feature, Table, View, newest_day

VIEW = View(
    name="user_stats",
    entity=USER,
    description="Counts over all interactions of a user so far",
    services=(RANKER_SERVICE,),
    rows=newest_day("user_stats", USER_ID),
    features=(
        Feature("user_interactions", "integer", "interactions"),
        Feature("user_distinct_items", "integer", "distinct_items"),
        Feature("user_mean_value", "number", "mean_value"),
        Feature("user_first_at", "moment", "first_at", "microseconds since 1970"),
    ),
    table=Table("user_stats"),
)
