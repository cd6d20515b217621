"""The same assets as in `dagster dev`, run in this process for the command line: one run, quiet, with step timings."""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal, get_args

import dagster as dg

from pipelines.generation import recipe
from pipelines.generation.recipe import Recipe
from pipelines.orchestration.checks import CHECKS
from pipelines.orchestration.data_assets import DATA_ASSETS
from pipelines.orchestration.instance import in_process_instance, process_tags
from pipelines.orchestration.model_assets import MODEL_ASSETS
from pipelines.orchestration.resources import EncoderResource, PostgresResource, Terminal
from polytower import postgres
from polytower.errors import UserError

Until = Literal["sequences", "content", "generation", "live"]
# What each step adds to the one before.
STEPS: dict[Until, tuple[str, ...]] = {
    "sequences": ("items", "interactions", "user_sequences"),
    "content": ("content_embeddings", "content_codes", "query_embeddings"),
    "generation": ("training_set", "checkpoint", "adapted_embeddings", "generation"),
    "live": ("live_generation", "feast_features"),
}


def assets_until(until: Until) -> list[str]:
    """The assets up to and with a step, in the order of the flow."""
    steps = get_args(Until)
    return [asset for step in steps[: steps.index(until) + 1] for asset in STEPS[step]]


def materialize(
    url: str | None = None,
    *,
    until: Until | None = None,
    selection: Sequence[str] | None = None,
    preset: str = "",
    start: str = "",
    options: Mapping[str, Any] | None = None,
    folder: str = "",
    images: str = "",
    own: Mapping[str, str] | None = None,
    before: datetime | None = None,
    progress: bool = True,
    take_over: bool = False,
    instance: dg.DagsterInstance | None = None,
) -> dict[str, Any]:
    """Materialises assets and runs their checks in this process; what is done already is found, not done again.

    url: the database (default: the platform's). until: last step of the flow (default: live; with `before` generation);
    selection: asset names instead. preset, options, start: what is trained, and from which pretrained model on
    (`recipe.chosen`). folder, images, own: load them first (`load_folder`). before: train and build a generation that
    knows no event at or after this moment. progress: step lines and bars on stderr. take_over: ends the session of a
    process that is at the same step. instance: Dagster's history (default: the one below the platform's home).

    Returns {"generation": number | None, "state": its state | None, "recipe": {"preset", "options", "source"} | None,
    "seconds": {step: s}, "assets": {asset: metadata}, "checks": {check: passed}, "warnings": [...]}. Raises UserError
    for a recipe that does not exist (before any work), when a blocking check fails (naming check and reason; nothing
    downstream ran) and for whatever an asset refuses. A killed run leaves finished assets, encoded chunks and epochs
    for the next one.
    """
    url = url or postgres.database_url()
    chosen = list(selection) if selection is not None else assets_until(_last_step(until, before))
    asked: Recipe | None = None
    trains = bool("checkpoint" in chosen or preset or options or start)
    if trains or "query_embeddings" in chosen:
        with postgres.connect(url) as connection:
            asked = recipe.chosen(connection, preset, options or {}, start)
        if progress and trains:
            sys.stderr.write(f"  {asked}\n")
    loading = {"folder": folder, "images": images, "own": dict(own or {}), "take_over": take_over}
    config = _run_config(chosen, asked, loading, before, take_over=take_over)
    log = _RunLog(progress)
    with _quiet(), _instance(instance) as opened:
        job = _definitions(url, log, progress=progress).resolve_implicit_global_asset_job_def()
        keys = [dg.AssetKey(name) for name in chosen]
        try:
            job.execute_in_process(instance=opened, asset_selection=keys, run_config=config, tags=process_tags())
        except dg.DagsterExecutionInterruptedError as interrupted:
            raise KeyboardInterrupt from interrupted
        except dg.DagsterError as error:
            if log.refusals:
                raise UserError("; ".join(log.refusals)) from error
            raise
    if log.refusals:  # of an asset that nothing follows
        raise UserError("; ".join(log.refusals))
    return {**log.summary(), "recipe": asdict(asked) if asked is not None and trains else None}


def _run_config(
    chosen: Sequence[str], asked: Recipe | None, loading: Mapping[str, Any], before: datetime | None, *, take_over: bool
) -> dict[str, Any]:
    """What Dagster hands to the assets that are chosen, and to no others: it refuses the rest."""
    ops: dict[str, Mapping[str, Any]] = {}
    if {"items", "interactions"} & set(chosen):
        ops["loaded_tables"] = loading
    if "training_set" in chosen:
        ops["training_set"] = {"before": before.isoformat() if before else ""}
    if "checkpoint" in chosen and asked is not None:
        ops["checkpoint"] = {"preset": asked.preset, "options": dict(asked.options), "start": asked.start}
    if "query_embeddings" in chosen and asked is not None:
        wanted = "queries" in asked.config.towers.reads
        ops["query_embeddings"] = {"wanted": wanted, "take_over": take_over}
    for asset in {"content_embeddings", "content_codes", "adapted_embeddings", "generation"} & set(chosen):
        ops[asset] = {"take_over": take_over}
    return {"loggers": {"run_log": {}}, "ops": {op: {"config": given} for op, given in ops.items()}}


def _last_step(until: Until | None, before: datetime | None) -> Until:
    if before is None:
        return until or "live"
    if until == "live":
        raise UserError(
            f"a generation that knows no event from {before.isoformat()} on does not go live by itself: leave out "
            "--until live, and promote it by hand (`polytower generations promote NUMBER`) if it shall serve"
        )
    return until or "generation"


class _RunLog(logging.Handler):
    """Listens to a run's events: prints one line per step, keeps timings, metadata and the checks' outcomes."""

    def __init__(self, progress: bool) -> None:
        super().__init__()
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.assets: dict[str, dict[str, Any]] = {}
        self.checks: dict[str, bool] = {}
        self.refusals: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "dagster_event", None)
        if event is None:
            if record.levelno >= logging.WARNING:
                self._warn(record.getMessage())
            return
        if event.is_step_success:
            self._step(event.step_key, event.step_success_data.duration_ms / 1000)
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            self._check(event.asset_check_evaluation_data)
        elif event.is_step_materialization and event.partition is None:
            materialization = event.step_materialization_data.materialization
            self.assets[materialization.asset_key.to_user_string()] = {
                name: entry.value for name, entry in materialization.metadata.items()
            }

    def summary(self) -> dict[str, Any]:
        """What `materialize` returns."""
        made = self.assets.get("live_generation") or self.assets.get("generation") or {}
        return {
            "generation": made.get("generation"),
            "state": "live" if "live_generation" in self.assets else made.get("state"),
            "seconds": self.seconds,
            "assets": self.assets,
            "checks": self.checks,
            "warnings": self.warnings,
        }

    def _step(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 3)
        if self.progress:
            sys.stderr.write(f"  {name.replace('_', ' '):30} {seconds:7.1f} s\n")

    def _check(self, evaluation: Any) -> None:
        name = f"{evaluation.asset_key.to_user_string()}.{evaluation.check_name}"
        self.checks[name] = evaluation.passed
        if evaluation.passed:
            return
        reason = f"the check {evaluation.check_name} on {evaluation.asset_key.to_user_string()} failed: "
        reason += evaluation.description or "no reason given"
        blocking = evaluation.blocking and evaluation.severity == dg.AssetCheckSeverity.ERROR
        if blocking:
            self.refusals.append(reason)
        else:
            self._warn(reason)

    def _warn(self, reason: str) -> None:
        self.warnings.append(reason)
        if self.progress:
            sys.stderr.write(f"  warning: {reason}\n")


def _definitions(url: str, log: _RunLog, *, progress: bool) -> dg.Definitions:
    @dg.logger
    def run_log(_: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("polytower.materialize", logging.DEBUG)
        logger.addHandler(log)
        return logger

    return dg.Definitions(
        assets=[*DATA_ASSETS, *MODEL_ASSETS],
        asset_checks=CHECKS,
        resources={
            "postgres": PostgresResource(url=url),
            "encoders": EncoderResource(),
            "terminal": Terminal(progress=progress),
        },
        loggers={"run_log": run_log},
        executor=dg.in_process_executor,
    )


@contextmanager
def _instance(given: dg.DagsterInstance | None) -> Iterator[dg.DagsterInstance]:
    if given is not None:
        yield given
        return
    with in_process_instance() as opened:
        yield opened


@contextmanager
def _quiet() -> Iterator[None]:
    """Dagster's and Great Expectations' own talk stays out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("dagster", "great_expectations")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
