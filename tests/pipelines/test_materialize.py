"""The flow on real Postgres: checks stop it, a second run finds everything done, killed runs are buried."""

import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from psycopg.types.json import Jsonb

from pipelines.generation import lifecycle, quality
from pipelines.generation.title_recall import TITLE_GATES
from pipelines.orchestration.instance import dagster_home, in_process_instance
from pipelines.orchestration.materialize import materialize
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import tiny_folder

# Great Expectations, Feast and their dependencies warn about their own code when they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::dagster.BetaWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "data")


@pytest.fixture
def history(platform: str) -> Iterator[dg.DagsterInstance]:
    with in_process_instance() as instance:
        yield instance


def test_the_whole_flow(
    history: dg.DagsterInstance, platform: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"towers.user_attributes": 32}
    first = materialize(folder=str(folder), preset="tiny", options=options, instance=history)
    assert first["generation"] == 1
    assert list(first["assets"]) == [
        "items", "interactions", "user_sequences", "content_embeddings", "content_codes", "query_embeddings",
        "training_set", "checkpoint", "adapted_embeddings", "generation", "live_generation", "feast_features",
    ]  # fmt: skip
    assert first["assets"]["items"]["dagster/row_count"] == 60
    assert first["assets"]["interactions"]["dagster/row_count"] == 640
    assert first["assets"]["content_embeddings"]["encoded"] == 119
    assert first["assets"]["checkpoint"]["curves"].startswith("![loss")
    gates = (*quality.CONTENT_GATES, *quality.CODE_GATES, *quality.GENERATION_GATES, *TITLE_GATES)
    assert len(first["checks"]) == 2 + len(gates)
    codes = first["assets"]["content_codes"]
    assert (codes["dagster/row_count"], codes["trained"], codes["coded"]) == (60, True, 60)
    errors = capfd.readouterr().err
    assert "live generation" in errors
    assert "DEBUG" not in errors
    with connect(platform) as connection:
        assert lifecycle.get(connection, 1).recipe == ("tiny", options)
    assert json.loads(json.dumps(first, default=str))["seconds"]["generation"] > 0

    modalities = history.get_materialized_partitions(dg.AssetKey("content_embeddings"))
    assert modalities == {"text", "attributes"}
    days = history.get_materialized_partitions(dg.AssetKey("user_sequences"))
    assert days == {*(f"2023-12-{day}" for day in range(27, 32)), *(f"2024-01-0{day}" for day in range(1, 6))}

    second = materialize(preset="tiny", options=options, progress=False, instance=history)
    assert second["generation"] == 1
    assert second["assets"]["content_embeddings"]["encoded"] == 0
    codes = second["assets"]["content_codes"]
    assert (codes["why"], codes["trained"], codes["coded"]) == ("the encoders are the same", False, 0)
    assert second["assets"]["user_sequences"]["days"] == "nothing changed"
    assert second["assets"]["checkpoint"]["reused"] is True
    assert [run["assets"]["feast_features"]["applied"] for run in (first, second)] == [True, False]
    assert capfd.readouterr().err == ""

    with connect(platform) as connection:
        live = lifecycle.live(connection)
        assert live is not None
        tower = connection.execute("select config ->> 'user_attributes' from towers where part = 'user_tower'")
        assert tower.fetchone() == ("32",)
        assert [gate["name"] for gate in live.quality["gates"]] == list(quality.GENERATION_GATES)
        gates = {gate.name: gate for gate in quality.generation_gates(connection, 1)}
        assert gates["ndcg_over_popularity"].value is not None
        # The gates are what promotion looks at: spoil the generation and its stored report follows at the next build.
        connection.execute("""update generations set metrics = '{"validation": {"ndcg@10": -1}}'""")
        spoiled = {gate.name: gate for gate in quality.generation_gates(connection, 1)}
        assert not spoiled["ndcg_over_popularity"].passed

    failing = quality.Gate("ann_recall", 0.5, 0.9, "at least").as_json()
    with connect(platform) as connection:
        connection.execute("update generations set state = 'ready', quality = %s", [Jsonb({"gates": [failing]})])
    reason = r"ann_recall on generation failed: generation 1: ann_recall is 0\.5 \(needs at least 0\.9\)"
    with pytest.raises(UserError, match=reason):
        materialize(selection=["generation", "live_generation"], progress=False, instance=history)
    with connect(platform) as connection:
        assert lifecycle.live(connection) is None


def test_a_failed_expectation_stops_the_flow(history: dg.DagsterInstance, platform: str, folder: Path) -> None:
    materialize(folder=str(folder), until="sequences", progress=False, instance=history)
    with connect(platform) as connection:
        connection.execute(
            "insert into interactions (user_id, item_id, occurred_at, value) values ('u1', 'i7', '2024-01-09', 'NaN')"
        )
    with pytest.raises(UserError, match=r"expectations on interactions failed: values are finite numbers.*'u1'"):
        materialize(until="sequences", progress=False, instance=history)
    with connect(platform) as connection:
        assert connection.execute("select max(day)::text from user_sequences").fetchone() == ("2024-01-05",)
    evaluations = history.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION), limit=10)
    assert any("values are finite numbers" in str(record.event_log_entry) for record in evaluations)


def test_a_deleted_item_warns_and_stops_nothing(history: dg.DagsterInstance, platform: str, folder: Path) -> None:
    materialize(folder=str(folder), until="sequences", progress=False, instance=history)
    with connect(platform) as connection:
        connection.execute("delete from items where item_id = 'i7'")
    result = materialize(preset="tiny", progress=False, instance=history)
    assert result["generation"] == 1
    assert [warning for warning in result["warnings"] if "every interaction has its item" in warning]


def test_an_asset_s_refusal_is_the_user_s_message(history: dg.DagsterInstance) -> None:
    with pytest.raises(UserError, match="no interactions to learn from"):
        materialize(selection=["training_set"], progress=False, instance=history)
    with pytest.raises(UserError, match="checkpoint has never been materialised"):
        materialize(selection=["generation"], progress=False, instance=history)


def test_one_day_can_be_done_again(history: dg.DagsterInstance, platform: str, folder: Path) -> None:
    from pipelines.orchestration.definitions import defs

    materialize(folder=str(folder), until="sequences", progress=False, instance=history)
    with connect(platform) as connection:
        connection.execute("update user_sequences set item_ids = '{}', occurred_ats = '{}', kinds = '{}'")
    job = defs.resolve_job_def("sequences")
    assert job.execute_in_process(instance=history, partition_key="2024-01-02").success
    with connect(platform) as connection:
        done = connection.execute(
            "select distinct day::text from user_sequences where item_ids <> '{}' order by 1"
        ).fetchall()
    assert ("2024-01-02",) in done
    assert ("2024-01-01",) not in done


def test_a_killed_run_is_buried_by_the_next(platform: str) -> None:
    from pipelines.orchestration.definitions import defs

    with in_process_instance() as instance:
        killed = instance.create_run_for_job(
            defs.resolve_job_def("load"),
            status=dg.DagsterRunStatus.STARTED,
            tags={"polytower/process": "999999999:0.5"},
        )
    with in_process_instance() as instance:
        found = instance.get_run_by_id(killed.run_id)
        assert found is not None
        assert found.status == dg.DagsterRunStatus.FAILURE


def test_dagsters_home_is_made_once_and_then_left_alone(platform: str) -> None:
    home = dagster_home()
    assert "enabled: false" in (home / "dagster.yaml").read_text()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n# mine\n")
    assert "# mine" in (dagster_home() / "dagster.yaml").read_text()
