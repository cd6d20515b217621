"""What somebody writes who fetches features through Feast's SDK: python -m tests.acceptance.feast_user < pairs.

Reads {"pairs": [[user, item, moment], …]} and writes {"online": columns, "historical": columns}; a process of its own,
since Feast's import is larger than all that asks it.
"""

import json
import sys
from typing import Any

import pandas as pd

from feature_repo.store import close, feature_store
from polytower.postgres import database_url


def main() -> None:
    """Online and historical features of the service `ranker`."""
    pairs = json.load(sys.stdin)["pairs"]
    store = feature_store(database_url())
    service = store.get_feature_service("ranker")
    entities = [{"user_id": user, "item_id": item} for user, item, _ in pairs]
    online = store.get_online_features(features=service, entity_rows=entities).to_dict()
    asked = pd.DataFrame(
        {
            "user_id": [user for user, _, _ in pairs],
            "item_id": [item for _, item, _ in pairs],
            "place": range(len(pairs)),  # Feast answers in an order of its own
            "event_timestamp": pd.to_datetime([moment for _, _, moment in pairs], utc=True),
        }
    )
    historical = store.get_historical_features(asked, service).to_df().sort_values("place")
    close(store)
    json.dump({"online": online, "historical": historical.to_dict("list")}, sys.stdout, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


if __name__ == "__main__":
    main()
