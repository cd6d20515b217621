"""What the source says about a user."""

from feature_repo.schema import RANKER_SERVICE, USER
from feature_repo.views.view import Feature, Rows, Table, View

VIEW = View(
    name="user_profile",
    entity=USER,
    description="What the source says about a user",
    services=(RANKER_SERVICE,),
    rows=Rows(
        now="select *, updated_at as as_of from polytower.users where user_id = wanted.user_id",
        before="select * from polytower.users where user_id = wanted.user_id and updated_at <= wanted.moment",
        backfilled="select * from polytower.users where user_id = wanted.user_id",
    ),
    features=(Feature("user_attributes", "json", "attributes", "a JSON object"),),
    table=Table("users", daily=False, as_of="updated_at"),
)
