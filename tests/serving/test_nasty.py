"""Every member of every request, replaced by what a hostile sender would put there: a typed problem, never a 500.

The walk follows the examples of the OpenAPI document, so that a new endpoint is walked without a new test.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

Path = tuple[str | int, ...]


def _brackets(depth: int) -> str:
    return "[" * depth + "]" * depth


NASTY = {
    "5,000 digits": "1" * 5000,
    "4,000 digits": "-" + "9" * 4000,
    "unsigned": "18446744073709551615",
    "a large exponent": "1e400",
    "a small exponent": "1e-400",
    "not a number": "NaN",
    "900 brackets": _brackets(900),
    "4,000 brackets": _brackets(4000),
    "nested in a filter": '{"genres":' + _brackets(900) + "}",
    "900 objects": '{"a":' * 900 + "1" + "}" * 900,
    "10,000 keys": "{" + ",".join(f'"k{n}":1' for n in range(10_000)) + "}",
    "10,000 values": '{"genres":{"any":[' + ",".join(map(str, range(10_000))) + "]}}",
    "a NUL": '"\\u0000"',
    "a NUL as a key": '{"a\\u0000": 1}',
    "half a character": '"\\ud800"',
    "20,000 letters": '"' + "x" * 20_000 + '"',
    "a year of five digits": '"+10000-01-01T00:00:00Z"',
    "a time before the first": '"0001-01-01T00:00:00+23:59"',
    "a time after the last": '"9999-12-31T23:59:59-23:59"',
    "a number for text": "7",
    "nothing": "null",
}
# Beside the document's own, what they leave out.
EXAMPLES: dict[str, list[Any]] = {
    "/v1/retrieve": [
        {
            "user_id": "ada",
            "filter": {"genres": {"any": ["Comedy"]}, "year": {"gte": 1}},
            "exclude": ["i01"],
            "allow": ["i02", "i04"],
            "merge": "diverse",
            "diversity": {"attribute": "genres", "weight": 0.1},
            "features": "ranker",
            "similarity": True,
        },
        {"history": ["i01"], "attributes": {"age": 3, "likes": ["x"]}},
    ],
    "/v1/interactions": [
        {"interactions": [{"user_id": "ada", "item_id": "i01", "occurred_at": "2026-01-01T00:00:00Z", "value": 1.5}]}
    ],
}


def _paths(document: Any, at: Path = ()) -> Iterator[Path]:
    yield at
    if isinstance(document, dict | list):
        for name, member in document.items() if isinstance(document, dict) else enumerate(document):
            yield from _paths(member, (*at, name))


def _bodies(document: Any) -> Iterator[str]:
    for at in _paths(document):
        changed = {"": json.loads(json.dumps(document))}
        inner: Any = changed
        for name in ("", *at)[:-1]:
            inner = inner[name]
        inner[("", *at)[-1]] = "@@"
        for nasty in NASTY.values():
            yield json.dumps(changed[""]).replace('"@@"', nasty)


def _is_typed(answer: Any) -> bool:
    if answer.status_code < 400:
        return True
    known = answer.json()["type"]
    return answer.status_code < 500 or known in ("/problems/no-user-tower", "/problems/loading")


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/retrieve:batch", "/v1/interactions", "/v1/features"])
def test_bodies(own_client: TestClient, path: str) -> None:
    document = own_client.get("/openapi.json").json()
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts == {"/v1/retrieve", "/v1/retrieve:batch", "/v1/interactions", "/v1/features"}
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    examples = document["components"]["schemas"][reference.rsplit("/", 1)[-1]]["examples"]
    for example in [*examples, *EXAMPLES.get(path, [])]:
        for body in dict.fromkeys(_bodies(example)):
            answer = own_client.post(path, content=body, headers={"content-type": "application/json"})
            assert _is_typed(answer), (body[:200], answer.text)


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY)
def test_paths_and_queries(client: TestClient, nasty: str) -> None:
    value = quote(nasty[:9000], safe="")
    for url in (
        f"/v1/items/i01/similar?filter={value}",
        f"/v1/items/i01/similar?k={value}",
        f"/v1/items/i01/similar?space={value}",
        f"/v1/items/{value}/similar",
        f"/v1/users/{value}/interests",
        f"/v1/users/ada/interests?vectors={value}",
    ):
        answer = client.get(url)
        assert _is_typed(answer), (url[:200], answer.text)


def test_a_filter_of_too_many_conditions_is_refused_by_name(client: TestClient) -> None:
    wanted = {f"k{n}": 1 for n in range(101)}
    answer = client.post("/v1/retrieve", json={"user_id": "ada", "filter": wanted})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request")
    assert "filter" in answer.json()["detail"]
    answer = client.get("/v1/items/i01/similar", params={"filter": json.dumps(wanted)})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/malformed-filter")
