"""One limit at every door: a file, HTTP, the expectations. The longest allowed passes all of them; one more, none."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_repo.schema import INTERACTIONS, MAX_ID_BYTES
from pipelines.expectations import validate
from pipelines.load.folder import load_folder
from polytower.postgres import connect
from serving.http.app import create_app

# Great Expectations and its dependencies warn about their own code when they are imported.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FIELDS = ("user_id", "item_id", "kind", "event_id")
LONGEST = {"latin": "x" * MAX_ID_BYTES, "three bytes each": "日" * (MAX_ID_BYTES // 3) + "x" * (MAX_ID_BYTES % 3)}
WORDS = f"longer than {MAX_ID_BYTES} bytes"
GOOD = {"user_id": "u", "item_id": "a", "kind": "view", "event_id": "e", "occurred_at": "2026-01-01T00:00:00Z"}


def _load(database: str, folder: Path, *events: dict[str, str]) -> list[str]:
    """Loads a folder with these events and their items; answers why rows were put aside."""
    folder.mkdir()
    items = dict.fromkeys(event["item_id"] for event in [GOOD, *events])
    rows = [[event[name] for name in GOOD] for event in [GOOD, *events]]
    files = {"items.csv": [["item_id"], *([item] for item in items)], "interactions.csv": [list(GOOD), *rows]}
    for name, lines in files.items():
        (folder / name).write_text("\n".join(",".join(line) for line in lines) + "\n")
    with connect(database) as connection:
        load_folder(connection, folder, max_rejected=1)
        found = connection.execute("select reason from rejected_rows where file like 'interactions%'").fetchall()
    return [reason for (reason,) in found]


def _post(database: str, event: dict[str, str]) -> tuple[int, dict[str, Any]]:
    with TestClient(create_app(database), raise_server_exceptions=False) as client:
        answer = client.post("/v1/interactions", json={"interactions": [event]})
        return answer.status_code, answer.json()


@pytest.mark.parametrize("alphabet", LONGEST)
def test_the_longest_ids_pass_every_door(database: str, tmp_path: Path, alphabet: str) -> None:
    longest = GOOD | dict.fromkeys(FIELDS, LONGEST[alphabet])
    assert _load(database, tmp_path / "data", longest) == []
    assert _post(database, longest) == (200, {"accepted": 0, "duplicates": 1})
    report = validate(database, INTERACTIONS)
    assert not report.blocking, [str(finding) for finding in report.broken]


def test_one_more_is_refused_in_the_same_words(database: str, tmp_path: Path) -> None:
    over = dict.fromkeys(FIELDS, LONGEST["three bytes each"] + "x")
    reasons = _load(database, tmp_path / "data", *(GOOD | {field: value} for field, value in over.items()))
    assert len(reasons) == len(FIELDS)
    assert {WORDS in reason for reason in reasons} == {True}
    for field, value in over.items():
        status, problem = _post(database, GOOD | {field: value})
        assert (status, problem["type"]) == (422, "/problems/invalid-request")
        assert f"interactions.0.{field}" in problem["detail"]
        assert WORDS in problem["detail"]
    with connect(database) as connection:
        for field, value in over.items():
            connection.execute(f"update interactions set {field} = %s", [value])  # type: ignore[call-overload]
    told = [finding.expectation for finding in validate(database, INTERACTIONS).broken if WORDS in finding.expectation]
    assert sorted(told) == sorted(
        f"no {field} is {'longer' if field == 'event_id' else 'empty or longer'} than {MAX_ID_BYTES} bytes"
        for field in FIELDS
    )


def test_questions_by_ids_that_nobody_can_have(database: str) -> None:
    """C1: ids of a thousand characters of three bytes are a fault of the question, not of the server."""
    with TestClient(create_app(database), raise_server_exceptions=False) as client:
        long = "日" * 1000
        answers = [
            client.post("/v1/retrieve", json={"user_id": long}),
            client.post("/v1/retrieve", json={"user_id": "u", "exclude": [long]}),
            client.post("/v1/interactions", json={"interactions": [{"user_id": long, "item_id": long}]}),
            client.post("/v1/features", json={"service": "ranker", "entities": {"user_id": [long], "item_id": ["a"]}}),
            client.get(f"/v1/items/{long}/similar"),
            client.get(f"/v1/users/{long}/interests"),
        ]
    assert [answer.status_code for answer in answers] == [422] * len(answers)
    assert {WORDS in answer.json()["detail"] for answer in answers} == {True}
