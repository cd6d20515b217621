"""A job's configuration reaches the flow; without one, the flow decides (recipe.chosen)."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pytest

from pipelines.orchestration import jobs
from pipelines.orchestration.resources import PostgresResource


@pytest.mark.parametrize("given", [{}, {"preset": "short", "options": {"epochs": 2}}], ids=str)
def test_a_job_passes_its_recipe_on(database: str, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, Any]) -> None:
    asked: dict[str, Any] = {}

    def materialize(*_: Any, **options: Any) -> dict[str, Any]:
        asked.update(options)
        return {"seconds": {}, "warnings": []}

    monkeypatch.setattr(jobs, "materialize", materialize)
    with dg.build_op_context() as context:
        jobs.run_everything(context, jobs.FlowConfig(**given), PostgresResource(url=database))
    assert {"preset": asked["preset"], "options": asked["options"]} == {"preset": "", "options": {}} | dict(given)
