"""What a job without a configuration trains: the model that serves, again."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import psycopg
import pytest
from psycopg.types.json import Jsonb

from pipelines.generation import lifecycle
from pipelines.orchestration import jobs
from pipelines.orchestration.resources import PostgresResource
from tests.pipelines.test_generations import build

WIDE = {"towers.dim": 16}


@pytest.mark.parametrize(
    ("live", "given", "trained"),
    [
        (None, {}, ("demo", {})),
        ({"preset": "short", "options": WIDE}, {}, ("short", WIDE)),
        ({"preset": "short"}, {}, ("short", {})),
        ({"preset": "short", "options": WIDE}, {"options": {"epochs": 2}}, ("short", {**WIDE, "epochs": 2})),
        ({"preset": "short", "options": WIDE}, {"preset": "long"}, ("long", {})),
    ],
    ids=str,
)
def test_a_run_renews_the_live_model(
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    live: Mapping[str, Any] | None,
    given: Mapping[str, Any],
    trained: tuple[str, Mapping[str, Any]],
) -> None:
    if live is not None:
        generation = build(connection)
        connection.execute("update generations set config = %s", [Jsonb(live)])
        lifecycle.promote(connection, generation)
        connection.commit()
    asked: dict[str, Any] = {}

    def materialize(*_: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return {"seconds": {}, "warnings": []}

    monkeypatch.setattr(jobs, "materialize", materialize)
    url = connection.info.dsn + f" password={connection.info.password}"
    with dg.build_op_context() as context:
        jobs.run_everything(context, jobs.FlowConfig(**given), PostgresResource(url=url))
    assert (asked["preset"], asked["options"]) == trained
