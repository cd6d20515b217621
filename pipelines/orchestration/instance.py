"""Dagster's own files: runs, events and schedules in SQLite below the platform's home, telemetry off."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import psutil

from polytower.files import private_folder
from polytower.settings import settings

# What `dagster dev` reads (with DAGSTER_HOME=<home>/dagster), written once and the user's from then on.
_WEB = """\
telemetry:
  enabled: false
"""
# Runs in the caller's own process leave its terminal alone: no captured output, no log lines.
_IN_PROCESS = """\
telemetry:
  enabled: false
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""
_PROCESS_TAG = "polytower/process"


def dagster_home() -> Path:
    """The folder to set DAGSTER_HOME to; created with its configuration when absent."""
    home = private_folder(settings().home / "dagster")
    for name, text in (("dagster.yaml", _WEB), ("in_process.yaml", _IN_PROCESS)):
        if not (home / name).exists():
            (home / name).write_text(text)
    return home


@contextmanager
def in_process_instance() -> Iterator[dg.DagsterInstance]:
    """The instance that the command line runs in; what `dagster dev` shows is the same history."""
    with dg.DagsterInstance.from_config(str(dagster_home()), config_filename="in_process.yaml") as instance:
        _bury_killed_runs(instance)
        yield instance


def process_tags() -> dict[str, str]:
    """Tags that tell later processes whether the one that began a run still lives."""
    process = psutil.Process()
    return {_PROCESS_TAG: f"{process.pid}:{process.create_time()}"}


def _bury_killed_runs(instance: dg.DagsterInstance) -> None:
    """Marks the runs of processes that are gone as failed: a killed one could not say so itself."""
    unfinished = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING])
    for run in instance.get_runs(filters=unfinished, limit=100):
        if _PROCESS_TAG in run.tags and not _alive(run.tags[_PROCESS_TAG]):
            instance.report_run_failed(run, "the process was killed; the next run continues where it stopped")


def _alive(process: str) -> bool:
    pid, created = process.split(":")
    try:
        return bool(psutil.Process(int(pid)).create_time() == float(created))
    except psutil.NoSuchProcess:
        return False
