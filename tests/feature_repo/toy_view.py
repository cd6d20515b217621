"""A feature view that exists in this program alone, a declaration and a table: read, written and shown at all doors.

python -m tests.feature_repo.toy_view prints what each door says of it, as JSON. A program of its own, since Feast's
objects are made of the declarations once, when feature_repo/definitions.py is imported.
"""

import json
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import feature_repo
from feature_repo.environment import feast_environment
from feature_repo.schema import ITEM_ID, RANKER_SERVICE, USER, USER_ID
from feature_repo.views import VIEWS
from feature_repo.views.view import Feature, Table, View, newest_day

REPOSITORY = Path(feature_repo.__file__).parent
MONDAY, TUESDAY = datetime(2026, 3, 2, 20, tzinfo=UTC), datetime(2026, 3, 3, 20, tzinfo=UTC)
# What a migration does.
TABLES = """
create table polytower.user_moods (
    user_id text, day date, as_of timestamptz not null, mood text not null, score double precision,
    primary key (user_id, day)
);
create view feast.user_mood as select user_id, as_of, mood, score as mood_score from polytower.user_moods;
"""
# What the file in feature_repo/views/ has.
VIEW = View(
    name="user_mood",
    entity=USER,
    description="How a user felt at the end of a day",
    services=(RANKER_SERVICE,),
    rows=newest_day("user_moods", USER_ID),
    features=(Feature("mood", "text"), Feature("mood_score", "number", "score")),
    table=Table("user_moods"),
)


def said(url: str) -> dict[str, Any]:
    """Door → what it says of the view."""
    import migrations
    from polytower.documents.features import page
    from polytower.postgres import connect

    migrations.upgrade(url)
    with connect(url) as connection:
        connection.execute(TABLES)
    return {"applied": _applied(url), **_feast(url), "http": _http(url), "page": "## user_mood" in page()}


def _applied(url: str) -> str:
    """Feast's own command line."""
    from click.testing import CliRunner
    from feast.cli.cli import cli

    os.environ.update(feast_environment(url))
    done = CliRunner().invoke(cli, ["-c", str(REPOSITORY), "apply"], catch_exceptions=False)
    return str(done.output)


def _feast(url: str) -> dict[str, Any]:
    import pandas as pd

    from feature_repo.store import close, feature_store
    from polytower.postgres import connect

    store = feature_store(url)
    try:
        moods = pd.DataFrame(
            {USER_ID: "u1", "mood": ["calm", "wild"], "mood_score": [0.25, 0.75], "as_of": [MONDAY, TUESDAY]}
        )
        store.write_to_online_store(VIEW.name, moods)
        features = ["user_mood:mood", "user_mood:mood_score"]
        online = store.get_online_features(features, {USER_ID: ["u1", "nobody"]}).to_dict()
        asked = pd.DataFrame({USER_ID: "u1", "event_timestamp": [MONDAY, TUESDAY, datetime(2026, 4, 1, tzinfo=UTC)]})
        past = store.get_historical_features(asked, features).to_df().sort_values("event_timestamp")
        with connect(url) as connection:
            before = connection.execute("select xmin::text, mood from user_moods order by day").fetchall()
        store.materialize(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC), [VIEW.name])
        with connect(url) as connection:
            after = connection.execute("select xmin::text, mood from user_moods order by day").fetchall()
    finally:
        close(store)
    return {
        "written": [mood for _, mood in before],
        "materialised": after == before,
        "online": [online["mood"], online["mood_score"]],
        "historical": [each if isinstance(each, str) else None for each in past["mood"]],
    }


def _http(url: str) -> list[Any]:
    from fastapi.testclient import TestClient

    from serving.http.app import create_app

    with TestClient(create_app(url)) as client:
        body = {"service": RANKER_SERVICE, "entities": {USER_ID: ["u1", "nobody"], ITEM_ID: ["i0", "i1"]}}
        answer = client.post("/v1/features", json=body)
    assert answer.status_code == 200, answer.text
    return [[row["mood"], row["mood_score"]] for row in answer.json()["rows"]]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    VIEWS[VIEW.name] = VIEW
    from polytower.postgres import database_url

    print(json.dumps(said(database_url())))
