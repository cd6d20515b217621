"""C2: a server whose database is read-only for a while, as a standby is until the failover."""

import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from polytower.postgres import connect
from serving import database
from serving.http import guard, keys
from serving.http.app import create_app
from tests.serving.conftest import PATIENT


def _set_read_only(url: str, value: str) -> None:
    statement = sql.SQL("alter database {} set default_transaction_read_only = {}")
    name = sql.Identifier(str(conninfo_to_dict(url)["dbname"]))
    with psycopg.connect(make_conninfo(url, dbname="postgres"), autocommit=True) as admin:
        admin.execute(statement.format(name, sql.Literal(value)))


def test_questions_are_answered_and_events_wait_for_the_failover(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((guard, "FRESH"), (guard, "NOTED"), (database, "RENEWAL")):
        monkeypatch.setattr(module, name, 0.0)
    with connect(own) as connection:
        _, key = keys.create(connection, "shop", ["read", "write"], rate=None, burst=1)
    event = {"interactions": [{"user_id": "ada", "item_id": "i30", "event_id": "e1"}]}
    first = {"interactions": [{"user_id": "ada", "item_id": "i30", "occurred_at": "1999-01-01T00:00:00Z"}]}
    _set_read_only(own, "on")
    app = create_app(own, caps=PATIENT, require_keys=True)
    with TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {key}"}) as client:
        question = {"user_id": "ada", "k": 3, "features": "ranker", "similarity": True}
        for _ in range(3):  # the keys' last use cannot be written meanwhile
            assert client.post("/v1/retrieve", json=question).status_code == 200
        assert client.get("/v1/items/i01/similar").status_code == 200
        assert client.get("/readyz").status_code == 200
        for refused in (client.post("/v1/interactions", json=body) for body in (event, first)):
            assert (refused.status_code, refused.json()["type"]) == (503, "/problems/read-only")
            assert "read-only" in refused.json()["detail"]
            assert refused.headers["retry-after"]
        _set_read_only(own, "off")
        answers = [client.post("/v1/interactions", json=event) for _ in range(10)]
        assert answers[-1].status_code == 200, answers[-1].text
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert client.post("/v1/interactions", json=first).json() == {"accepted": 1, "duplicates": 0}
