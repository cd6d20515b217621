"""What users lean on is frozen: commands and options, the HTTP document, SQL signatures, and how a training goes."""

import json
from pathlib import Path

import click
import psycopg

from tests import goldens

SIGNATURES = """
select p.proname || '(' || pg_get_function_arguments(p.oid) || ') -> ' || pg_get_function_result(p.oid)
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = 'polytower' and p.prokind = 'f' order by 1
"""


def test_commands_and_options() -> None:
    from polytower.cli import cli

    goldens.check("cli.txt", "\n".join(surface(cli, "polytower")) + "\n")


def surface(command: click.Command, path: str) -> list[str]:
    """One line for each command, with its options and arguments."""
    if isinstance(command, click.Group):
        return [line for name in sorted(command.commands) for line in surface(command.commands[name], f"{path} {name}")]
    names = sorted(name for parameter in command.params for name in (parameter.opts or [str(parameter.name)]))
    return [" ".join([path, *names])]


def test_the_http_document() -> None:
    from serving.http.app import create_app

    document = create_app("postgresql://nobody@nowhere/nothing", require_keys=True).openapi()
    goldens.check("openapi.json", json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def test_sql_signatures(connection: psycopg.Connection) -> None:
    found = [row[0] for row in connection.execute(SIGNATURES)]
    goldens.check("sql.txt", "\n".join(found) + "\n")


def test_a_short_training(tmp_path: Path) -> None:
    """The loss of each epoch to three digits: a change of the objective, the data order or the start shows here."""
    from encoders.config import TowersConfig, TrainConfig
    from encoders.training.train import train
    from tests.encoders.data import tiny_catalogue, tiny_histories

    shape = TowersConfig(dim=16, history=8, interests=2, content_width=16)
    config = TrainConfig(towers=shape, epochs=4, batch_rows=4, negatives=0, threads=1, device="cpu")
    curves = train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path).curves
    goldens.check("loss_curve.json", json.dumps([round(point.loss, 3) for point in curves]) + "\n")
