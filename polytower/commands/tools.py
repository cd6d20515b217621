"""The tools around the platform: the database, and Feast, Dagster and the benchmarks with the environment they need."""

import os
import sys
import tempfile
from pathlib import Path

import click

from polytower import signals
from polytower.commands.output import AS_JSON, answer, require_schema, say
from polytower.errors import UserError
from polytower.readers import CONNECTIONS, TIMEOUT

BENCHMARKS = ["encoding", "features", "flow", "loading", "retrieval", "training"]


@click.group()
def db() -> None:
    """Start or stop the embedded Postgres, print the database's URL, open psql, give analysts a login."""


@db.command()
def start() -> None:
    """Start the embedded Postgres and keep it running until `polytower db stop`."""
    from polytower.embedded import held
    from polytower.settings import settings
    from polytower.url import shown

    server = held(settings().postgres_dir)
    server.pin()
    click.echo(shown(server.url))
    say("`polytower db url` prints it with the password, `polytower db psql` opens it")


@db.command()
def stop() -> None:
    """Stop the embedded Postgres."""
    from polytower.postgres import EmbeddedPostgres
    from polytower.settings import settings

    EmbeddedPostgres(settings().postgres_dir).stop()


@db.command()
def url() -> None:
    """Print the database's URL, password included."""
    from polytower.postgres import database_url

    click.echo(database_url())


@db.command()
@click.argument("name")
@click.option(
    "--timeout",
    type=click.IntRange(0, 86_400),
    default=TIMEOUT,
    show_default=True,
    help="Seconds a statement may run; 0: no limit.",
)
@click.option(
    "--connections", type=click.IntRange(1, 1000), default=CONNECTIONS, show_default=True, help="Connections at a time."
)
@click.option("--renew", is_flag=True, help="Give an existing login a new password and these limits.")
@click.option("--drop", is_flag=True, help="Remove the login.")
@AS_JSON
def reader(name: str, timeout: int, connections: int, renew: bool, drop: bool, as_json: bool) -> None:
    """Create a login NAME that reads and writes nothing, and print its URL, this once.

    It has the rights of polytower_reader: all tables but API keys, all functions.
    """
    from polytower import readers
    from polytower.postgres import connect, database_url

    if drop and renew:
        raise click.UsageError("--drop and --renew exclude each other")
    with connect() as connection:
        require_schema(connection)
        if drop:
            readers.drop(connection, name)
            answer({"name": name, "dropped": True}, as_json=as_json, text=f"login {name} is removed")
            return
        password = readers.create(connection, name, readers.Limits(timeout, connections), renew=renew)
    url = readers.url_of(database_url(), name, password)
    say("keep this URL now, its password cannot be shown again; with the embedded Postgres, `polytower db start` keeps"
        " it answering")  # fmt: skip
    answer({"name": name, "url": url}, as_json=as_json, text=url)


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the database (arguments are passed on)."""
    from polytower.postgres import database_url, psql_program, psql_service

    # A file of mode 0600: neither the list of processes nor the environment shows the password.
    with tempfile.NamedTemporaryFile("w", prefix="polytower-") as file:
        file.write(psql_service(database_url()))
        file.flush()
        environment = {"PGSERVICEFILE": file.name, "PGSERVICE": "polytower"}
        # what our functions refuse is one line, without the lines of theirs that it went through
        _run([psql_program(), "--set", "SHOW_CONTEXT=never", *arguments], environment, interactive=True)


@click.command()
def env() -> None:
    """Print the exports that Feast and Dagster need: eval "$(polytower env)". Keeps the embedded Postgres running."""
    import shlex

    from polytower.postgres import EmbeddedPostgres
    from polytower.settings import settings

    for name, value in _tool_environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")
    if settings().database_url is None:
        EmbeddedPostgres(settings().postgres_dir).pin()
        say("the embedded Postgres keeps running; `polytower db stop` stops it")


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def feast(arguments: tuple[str, ...]) -> None:
    """Run Feast on the feature repository: polytower feast apply | serve | ui | materialize-incremental …"""
    import feature_repo

    program = Path(sys.executable).with_name("feast")
    folder = str(Path(feature_repo.__file__).parent)
    _run([str(program), "-c", folder, *_on_this_machine(arguments)], _tool_environment())


def _on_this_machine(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """`feast ui` would let the whole network in; whoever wants that says `--host`."""
    told = any(each.startswith(("-h", "--host")) for each in arguments)
    return arguments if arguments[:1] != ("ui",) or told else (*arguments, "--host", "127.0.0.1")


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def dagster(arguments: tuple[str, ...]) -> None:
    """Run Dagster on the platform's assets: polytower dagster dev."""
    program = Path(sys.executable).with_name("dagster")
    module = ["-m", "pipelines.orchestration.definitions"] if arguments[:1] == ("dev",) else []
    _run([str(program), *arguments, *module], _tool_environment())


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> None:
    """Run a benchmark (from a checkout). Its --help lists its options."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / f"{name}.py").is_file():
        raise UserError("benchmarks are part of a checkout, not of the installed package: run this in a clone")
    os.chdir(checkout)
    _run([sys.executable, "-m", f"benchmarks.{name}", *arguments], {})


def _tool_environment() -> dict[str, str]:
    from feature_repo.environment import feast_environment
    from pipelines.orchestration.instance import dagster_home
    from polytower.postgres import database_url
    from polytower.settings import settings

    places = {"POLYTOWER_HOME": str(settings().home), "DAGSTER_HOME": str(dagster_home())}
    return places | feast_environment(database_url())


def _run(command: list[str], environment: dict[str, str], *, interactive: bool = False) -> None:
    """Runs another program in the foreground; this process keeps its lease on the embedded Postgres meanwhile."""
    try:
        status = signals.run(command, {**os.environ, **environment}, interactive=interactive)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed: run `make install`") from error
    raise SystemExit(status)
