"""The asset graph as a frozen picture, and everything that `dagster dev` evaluates by itself."""

import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from feature_repo.modalities import MODALITIES
from pipelines.generation.quality import CODE_GATES, CONTENT_GATES, GENERATION_GATES
from pipelines.generation.title_recall import TITLE_GATES
from pipelines.load.folder import load_folder
from pipelines.orchestration.materialize import STEPS, assets_until
from pipelines.orchestration.resources import PostgresResource
from polytower.postgres import connect
from tests.factories import tiny_folder

ROOT = Path(__file__).parents[2]
GRAPH: dict[str, tuple[str, set[str], str | None]] = {
    # asset: (group, what it needs, partitions)
    "items": ("data", set(), None),
    "interactions": ("data", {"items"}, None),
    "user_sequences": ("data", {"interactions"}, "daily"),
    "content_embeddings": ("content", {"items"}, "modality"),
    "content_codes": ("content", {"content_embeddings"}, None),
    "query_embeddings": ("content", {"interactions", "content_embeddings"}, None),
    "training_set": ("model", {"user_sequences", "content_embeddings", "query_embeddings"}, None),
    "checkpoint": ("model", {"training_set"}, None),
    "adapted_embeddings": ("model", {"checkpoint"}, None),
    "generation": ("model", {"adapted_embeddings"}, None),
    "live_generation": ("serving", {"generation"}, None),
    "feast_features": ("serving", {"live_generation"}, None),
}
CHECKS = {
    "items": {"expectations"},
    "interactions": {"expectations"},
    "content_embeddings": set(CONTENT_GATES),
    "content_codes": set(CODE_GATES),
    "generation": {*GENERATION_GATES, *TITLE_GATES},
}


@pytest.fixture(scope="module")
def defs() -> Iterator[dg.Definitions]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        from pipelines.orchestration.definitions import defs

        yield defs


def partitions(spec: dg.AssetSpec) -> str | None:
    match spec.partitions_def:
        case dg.DailyPartitionsDefinition():
            return "daily"
        case dg.StaticPartitionsDefinition() as static:
            assert static.get_partition_keys() == list(MODALITIES)
            return "modality"
    return None


def test_the_graph_is_the_documented_one(defs: dg.Definitions) -> None:
    found = {
        spec.key.to_user_string(): (
            spec.group_name,
            {dependency.asset_key.to_user_string() for dependency in spec.deps},
            partitions(spec),
        )
        for spec in defs.resolve_all_asset_specs()
    }
    assert found == GRAPH
    described = (ROOT / "docs" / "dagster.md").read_text()
    assert [name for name in GRAPH if f"`{name}`" not in described] == []


def test_every_check_blocks(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    found: dict[str, set[str]] = {}
    for key in graph.asset_check_keys:
        found.setdefault(key.asset_key.to_user_string(), set()).add(key.name)
        assert graph.get_check_spec(key).blocking, key
    assert found == CHECKS


def test_dagster_can_load_everything(defs: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(defs)
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert configuration["tool"]["dagster"] == {"module_name": "pipelines.orchestration.definitions"}
    repository = defs.get_repository_def()
    assert {job.name for job in repository.get_all_jobs()} >= {
        "sequences", "content", "load", "train", "refresh", "full"
    }  # fmt: skip
    assert {schedule.name for schedule in repository.schedule_defs} == {"daily_refresh", "nightly_generation"}
    assert {sensor.name for sensor in repository.sensor_defs} == {"new_data"}


def test_jobs_cover_what_they_say(defs: dg.Definitions) -> None:
    def assets(name: str) -> set[str]:
        return {key.to_user_string() for key in defs.resolve_job_def(name).asset_layer.executable_asset_keys}

    assert assets("sequences") == {"user_sequences"}
    assert assets("content") == {"content_embeddings"}
    assert assets("load") == {"items", "interactions"}
    assert assets("train") == {
        "training_set", "checkpoint", "adapted_embeddings", "generation", "live_generation", "feast_features",
    }  # fmt: skip


def test_steps_of_the_command_line_follow_the_graph() -> None:
    flow = assets_until("live")
    assert sorted(flow) == sorted(GRAPH)
    for place, asset in enumerate(flow):
        assert GRAPH[asset][1] <= set(flow[:place]), asset
    assert assets_until("sequences") == list(STEPS["sequences"])


def test_backfills_of_many_days_are_one_run(defs: dg.Definitions) -> None:
    sequences = defs.resolve_asset_graph().get(dg.AssetKey("user_sequences"))
    assert sequences.backfill_policy == dg.BackfillPolicy.single_run()


def test_the_sensor_asks_once_per_load(defs: dg.Definitions, platform: str, tmp_path: Path) -> None:
    sensor = defs.get_repository_def().get_sensor_def("new_data")

    def look(cursor: str | None) -> Any:
        with dg.build_sensor_context(cursor=cursor, resources={"postgres": PostgresResource()}) as context:
            return sensor.evaluate_tick(context)

    assert look(None).skip_message
    with connect(platform) as connection:
        load_folder(connection, tiny_folder(tmp_path))
    first = look(None)
    assert [request.run_key for request in first.run_requests] == ["1/640"]
    assert look(first.cursor).skip_message
    with connect(platform) as connection:
        connection.execute("insert into interactions (user_id, item_id, occurred_at) values ('u1', 'i1', '2024-01-02')")
    assert [request.run_key for request in look(first.cursor).run_requests] == ["1/641"]


def test_schedules_evaluate(defs: dg.Definitions) -> None:
    for schedule in defs.get_repository_def().schedule_defs:
        ticked = schedule.evaluate_tick(dg.build_schedule_context())
        assert ticked.run_requests is not None
        assert len(ticked.run_requests) == 1


def test_dagster_s_own_command_loads_the_project(tmp_path: Path) -> None:
    environment = {**os.environ, "DAGSTER_HOME": str(tmp_path), "POLYTOWER_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "dagster", "definitions", "validate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pipelines.orchestration.definitions" in done.stdout + done.stderr
