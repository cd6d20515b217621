"""The command line: parse, call one function, print. Heavy libraries are imported by the command that needs them."""

import os
import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from polytower import __version__, signals
from polytower.commands.export import export
from polytower.commands.forget import forget
from polytower.commands.generations import generations
from polytower.commands.modalities import CONTENT, own_columns
from polytower.commands.moment import Moment
from polytower.commands.options import FOLDER, OPTIONS, SHOWN, START, parsed
from polytower.commands.output import AS_JSON, answer, experiment_table, metrics_table, require_schema, say, table
from polytower.commands.pretrain import pretrain
from polytower.commands.retrieve import retrieve, similar
from polytower.commands.serve import keys, serve
from polytower.commands.tools import bench, dagster, db, env, feast
from polytower.failures import explained

ROWS_PUT_ASIDE = 3
TAKE_OVER = click.option(
    "--take-over", is_flag=True, help="If another process is doing the same work, end its session instead of waiting."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """polytower: multimodal embeddings, several interests per user, and retrieval in your own Postgres.

    Start with `polytower load DIR`, then `polytower materialize`, then `polytower retrieve USER`.
    State is kept in $POLYTOWER_HOME (default: .polytower). Set $POLYTOWER_DATABASE_URL to use a Postgres of your own.
    """


@cli.command()
@AS_JSON
def init(as_json: bool) -> None:
    """Create or upgrade the database (and start the embedded Postgres if no URL is set)."""
    revision = _initialise()
    answer({"revision": revision}, as_json=as_json, text=f"the database is at revision {revision}")


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--images", type=FOLDER, help="Folder of the files named in the items' `image` column.")
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Refuse the load if more than this share of a file's rows is faulty.",
)
@TAKE_OVER
@AS_JSON
@own_columns
def load(
    folder: Path, images: Path | None, max_rejected: float, take_over: bool, as_json: bool, own: dict[str, str]
) -> None:
    """Load interactions, items and users from FOLDER (Parquet, CSV or JSON lines). Loading twice changes nothing.

    Exit status: 0 if every row was taken, 3 if some rows were put aside (they are listed, and kept in the table
    rejected_rows) and the rest loaded, 1 if the load was refused and nothing changed.
    """
    from pipelines.load.folder import load_folder
    from polytower.postgres import connect

    _initialise()
    with connect() as connection:
        report = load_folder(
            connection, folder, images, own=own, max_rejected=max_rejected, progress=True, take_over=take_over
        )
    answer(report.as_json(), as_json=as_json, text="\n".join(report.lines()))
    if report.rejected:
        raise SystemExit(ROWS_PUT_ASIDE)


@cli.command()
@click.option(
    "--preset",
    default="",
    help="Training preset; docs/models.md lists them [default: preset and options of the live generation, else demo].",
)
@OPTIONS
@START
@click.option(
    "--until",
    type=click.Choice(["sequences", "content", "generation", "live"]),
    help="Stop after this step [default: live; with --before: generation].",
)
@click.option(
    "--before",
    type=Moment(),
    help="Train and build a generation that knows no event at or after this moment, such as 2000-12-01; for training "
    "sets of the past. It does not go live.",
)
@TAKE_OVER
@AS_JSON
def materialize(
    preset: str,
    options: tuple[str, ...],
    start: Path | None,
    until: Any,
    before: datetime | None,
    take_over: bool,
    as_json: bool,
) -> None:
    """Run the Dagster assets in process: checks, sequences, content, towers, generation, promotion.

    Without options, the model that is live is trained again on today's data; --set alone changes its options.
    """
    from pipelines.orchestration.materialize import materialize as run

    _initialise()
    result = run(
        preset=preset,
        options=parsed(options),
        start=str(start.resolve()) if start else "",
        until=until,
        before=before,
        progress=True,
        take_over=take_over,
    )
    rows = [(step, f"{seconds:.1f}") for step, seconds in result["seconds"].items()]
    title = f"generation {result['generation']} is {result['state']}" if result["generation"] else ""
    if before is not None and title:
        title += f" and knows no event from {before.isoformat()} on"
    text = table(rows, ["step", "seconds"], title=title)
    answer(result, as_json=as_json, text=text)


@cli.command()
@click.option("--generation", type=int, help="Generation to evaluate (default: the live one).")
@AS_JSON
def evaluate(generation: int | None, as_json: bool) -> None:
    """Evaluate a generation's towers (leave-one-out) next to popularity and item-kNN on the same split."""
    from pipelines.generation.evaluation import evaluate_generation
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        report = evaluate_generation(connection, generation, progress=True)
    answer(report.as_json(), as_json=as_json, text=metrics_table(report))


@cli.command()
@click.option("--images", type=FOLDER, help="Folder of posters named by item id (1.jpg …): adds the image modality.")
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@AS_JSON
def demo(images: Path | None, preset: str, as_json: bool) -> None:
    """Run the whole flow on MovieLens-100k: load, check, encode, train, build, promote, evaluate, retrieve."""
    from polytower.commands.demo import run

    _initialise()
    report = run(images=images, preset=preset)
    answer(report.as_json(), as_json=as_json, text=report.text())


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Number of runs, seeded 0, 1, 2 …"
)
@click.option(
    "--split",
    default="leave_one_out",
    show_default=True,
    type=click.Choice(
        [
            "leave_one_out",
            "refit",
            "temporal",
            "strong_generalisation",
            "cold_items",
            "cold_users",
            "future",
            "searches",
        ]
    ),
    help="How the test items are held out.",
)
@CONTENT
@click.option("--images", type=FOLDER, help="Folder of the items' pictures, for --content image.")
@OPTIONS
@START
@click.option(
    "--distributed",
    is_flag=True,
    help="Run as one of several processes: torchrun --nproc-per-node N -m polytower.cli experiment … --distributed.",
)
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for checkpoints, from which a later run resumes [default: in $POLYTOWER_HOME].",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    type=click.Choice(["equal_width", "permuted", "frozen"]),
    help="Also train IDs alone of equal width, with content shuffled over the items, or with encoders left as they are,"
    " and compare (repeatable).",
)
@click.option(
    "--against",
    type=FOLDER,
    help="Compare with another run, question by question: the folder that it was written --into.",
)
@AS_JSON
@own_columns
def experiment(
    folder: Path,
    preset: str,
    seeds: int,
    split: str,
    content: tuple[Any, ...],
    images: Path | None,
    options: tuple[str, ...],
    start: Path | None,
    distributed: bool,
    into: Path | None,
    controls: tuple[str, ...],
    against: Path | None,
    as_json: bool,
    own: dict[str, str],
) -> None:
    """Train and evaluate a preset straight from FOLDER, without a database, next to the baselines."""
    from encoders.experiments.experiment import run_experiment
    from encoders.training.distributed import ALONE, processes
    from pipelines.load.dataset import read_folder
    from polytower.settings import settings

    config = settings()
    # Runs that differ in anything keep apart, so that each finds its own state when it goes on.
    name = "-".join([folder.resolve().name, preset, split, *content, *options]).replace("/", "_")
    data, rejections = read_folder(folder, own=own)
    with processes() if distributed else nullcontext(ALONE) as world:
        for rejection in rejections.kept[:SHOWN] if world.first else ():
            say(f"skipped: {rejection}")
        report = run_experiment(
            data, preset, range(seeds), directory=into or config.home / "experiments" / name,
            modalities=content, split=split, options=parsed(options), device=config.device, progress=world.first,
            images=images, world=world, controls=controls, against=against,
            cache=config.home / "experiments" / "content", start=start,
        )  # fmt: skip
        for told in report["told"] if world.first else ():
            say(told)
    if world.first:
        answer(report, as_json=as_json, text=experiment_table(report))


@cli.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Check everything the platform needs, and say how to get what is missing."""
    from polytower.commands.doctor import examine

    findings = examine()
    rows = [("ok" if f.ok else "MISSING", f.name, f.detail, "" if f.ok else f.remedy) for f in findings]
    answer([vars(f) for f in findings], as_json=as_json, text=table(rows, ["", "what", "found", "way out"]))
    if not all(finding.ok for finding in findings):
        raise SystemExit(1)


def _initialise() -> str:
    import migrations

    migrations.upgrade()
    return migrations.head()


for command in (
    pretrain, retrieve, similar, export, generations, forget, keys, serve, db, env, feast, dagster, bench,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Entry point: what a user can mend is one message and exit status 1; Ctrl-C ends with 130, SIGTERM with 143."""
    # Checkpoints, snapshots and histories hold who did what: they are nobody else's to read.
    os.umask(0o077)
    signals.heed()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        word, status = ("terminated", 143) if signals.terminated() else ("interrupted", 130)
        say(f"{word}; run the same command again to continue")
        raise SystemExit(status) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        message = explained(error)
        if message is None:
            raise
        if "--json" in sys.argv:
            answer({"error": message}, as_json=True)
        say(f"error: {message}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
