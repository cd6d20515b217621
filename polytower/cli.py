"""The command line: parse, call one function, print. Heavy libraries are imported by the command that needs them."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from polytower import __version__, signals
from polytower.commands.generations import generations
from polytower.commands.modalities import CONTENT, own_columns
from polytower.commands.output import AS_JSON, answer, experiment_table, metrics_table, require_schema, say, table
from polytower.commands.retrieve import retrieve, similar
from polytower.commands.serve import keys, serve
from polytower.commands.tools import bench, dagster, db, env, feast
from polytower.failures import explained

ROWS_PUT_ASIDE = 3
SHOWN = 20  # rejected rows that `experiment` names
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OPTIONS = click.option(
    "--set",
    "--option",
    "options",
    multiple=True,
    metavar="NAME=JSON",
    help="Change one option of the preset, such as epochs=40 or towers.interests=1 (repeatable).",
)


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
@click.option("--preset", default="demo", show_default=True, help="Training preset; docs/models.md lists them.")
@OPTIONS
@click.option(
    "--until",
    type=click.Choice(["sequences", "content", "generation", "live"]),
    default="live",
    show_default=True,
    help="Stop after this step.",
)
@TAKE_OVER
@AS_JSON
def materialize(preset: str, options: tuple[str, ...], until: Any, take_over: bool, as_json: bool) -> None:
    """Run the Dagster assets in process: checks, sequences, content, towers, generation, promotion."""
    from pipelines.orchestration.materialize import materialize as run

    _initialise()
    result = run(preset=preset, options=_options(options), until=until, progress=True, take_over=take_over)
    rows = [(step, f"{seconds:.1f}") for step, seconds in result["seconds"].items()]
    title = (
        f"generation {result['generation']} is {'live' if until == 'live' else 'ready'}" if result["generation"] else ""
    )
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
    type=click.Choice(["equal_width", "permuted"]),
    help="Also train IDs alone of equal width, or with content shuffled over the items, and compare (repeatable).",
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
            modalities=content, split=split, options=_options(options), device=config.device, progress=world.first,
            images=images, world=world, controls=controls, against=against,
            cache=config.home / "experiments" / "content",
        )  # fmt: skip
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


def _options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=JSON pairs as a dict; a value that is no JSON is taken as a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--set")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


for command in (retrieve, similar, generations, keys, serve, db, env, feast, dagster, bench):
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
