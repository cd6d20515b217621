"""A modality that exists in this program alone, a record and an encoder: goes from a folder to all doors.

python -m tests.toy_modality FOLDER prints what each door says of it, as JSON. A program of its own, since partitions,
views and models are made of the records once, when they are imported.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encoders.content.encoder import Encoded, Rows
from encoders.content.registry import CONTENT_ENCODERS
from feature_repo.modalities import MODALITIES, Modality

ITEM = "i3"


class Letters:
    """How often each letter occurs in a title."""

    modality = "letters"
    revision = "letters-v1"
    model = "letters"
    dim = 26
    device = "cpu"
    config: Mapping[str, Any] = {}

    def encode(self, contents: Sequence[str], batch_size: int | None = None) -> Iterator[Rows]:
        counts = np.array([[text.count(chr(97 + n)) for n in range(self.dim)] for text in contents], np.float32)
        yield counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def encode_chunks(self, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        return (Encoded(next(self.encode(chunk))) for chunk in chunks)


def register() -> None:
    MODALITIES["letters"] = Modality(
        name="letters",
        reads=("title",),
        content_sql="lower(title)",
        hash_sql="encode(sha256(convert_to(content, 'UTF8')), 'hex')",
        has_sql="content ~ '[a-z]'",
        content=lambda item: (item.get("title") or "").lower() or None,
        content_hash=lambda item: hashlib.sha256(item["title"].lower().encode()).hexdigest(),
    )
    CONTENT_ENCODERS["letters"] = lambda **_: Letters()


def said(folder: Path) -> dict[str, Any]:
    """Door → what it says of the modality."""
    import migrations
    from pipelines.generation.training_set import read_catalogue
    from pipelines.load.folder import load_folder
    from pipelines.orchestration.materialize import materialize
    from polytower.postgres import connect, database_url

    url = database_url()
    migrations.upgrade(url)
    with connect(url) as connection:
        load_folder(connection, folder)
    made = materialize(url, preset="tiny", options={"epochs": 1, "threads": 1}, progress=False)
    with connect(url) as connection:
        catalogue, encoders = read_catalogue(connection)
        (tower,) = connection.execute("select config -> 'modalities' from towers where part = 'content'").fetchone()  # type: ignore[misc]
        (wide,) = connection.execute(
            "select letters_embedding::real[] from item_content where item_id = %s", [ITEM]
        ).fetchone()  # type: ignore[misc]
    return {
        "encoded": made["assets"]["content_embeddings"]["encoded"],
        "catalogue": [catalogue.content["letters"].shape[1], encoders["letters"]],
        "towers": tower,
        "sql": wide,
        **_feast(url),
        **_served(url),
    }


def _feast(url: str) -> dict[str, Any]:
    import pandas as pd

    from feature_repo.store import close, feature_store

    store = feature_store(url)
    try:
        features = ["item_content:letters_embedding"]
        online = store.get_online_features(features, [{"item_id": ITEM}]).to_dict()
        moments = pd.to_datetime(["2200-01-01"], utc=True)
        entities = pd.DataFrame({"item_id": [ITEM], "event_timestamp": moments})
        past = store.get_historical_features(entities, features).to_df()
    finally:
        close(store)
    return {
        "online": online["letters_embedding"][0],
        "historical": [float(number) for number in past["letters_embedding"][0]],
    }


def _served(url: str) -> dict[str, Any]:
    from fastapi.testclient import TestClient

    from serving.http.app import create_app

    with TestClient(create_app(url)) as client:
        similar = client.get(f"/v1/items/{ITEM}/similar", params={"space": "content", "k": 3})
        body = {"user_id": "u0", "k": 1, "similarity": True, "features": "ranker"}
        answer = client.post("/v1/retrieve", json=body)
    assert similar.status_code == answer.status_code == 200, (similar.text, answer.text)
    (candidate,) = answer.json()["candidates"]
    return {
        "similar": len(similar.json()["items"]),
        "similarity": len(candidate["similarity"]["similarity_letters"]),
        "candidate": len(candidate["features"]["letters_embedding"]),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    register()
    print(json.dumps(said(Path(sys.argv[1])), default=str))
