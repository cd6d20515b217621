"""What the command line prints: tables for people on stdout, or one JSON line for programs; talk goes to stderr."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from polytower.errors import UserError

if TYPE_CHECKING:
    from pipelines.generation.evaluation import EvaluationReport

AS_JSON = click.option("--json", "as_json", is_flag=True, help="End stdout with one JSON line instead of tables.")


def say(text: str) -> None:
    """One line about what is going on, on stderr, so that stdout stays the answer."""
    click.echo(text, err=True)


def answer(value: Any, *, as_json: bool, text: str = "") -> None:
    """The command's answer: `value` as the last line of stdout in JSON, else `text`."""
    click.echo(json.dumps(value, default=str, ensure_ascii=False) if as_json else text)


def table(rows: Sequence[Sequence[Any]], columns: Sequence[str], title: str = "") -> str:
    """Rows as a plain text table; numbers to the right, long cells cut to the terminal's width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="ellipsis", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(_cell(value)) for value in row))
    # Piped output has no width of its own: wide enough that nothing is cut.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip()


def metrics_table(report: "EvaluationReport") -> str:
    """The model beside its baselines, with and without masking of seen items."""
    names = ["recall@10", "recall@50", "recall@100", "ndcg@10", "coverage@10"]
    asked = _asked(report.questions, report.users)
    parts = []
    for masking in ("masked", "unmasked"):
        rows = [(who, *(found[name] for name in names)) for who, found in report.contestants(masking).items()]
        parts.append(table(rows, [f"{asked} test items, seen {masking}", *names]))
    return "\n\n".join(parts)


def experiment_table(report: dict[str, Any]) -> str:
    """An experiment's model (mean over seeds) beside its baselines, seen items masked and not."""
    names = ["recall@10", "recall@50", "recall@100", "ndcg@10"]
    parts = []
    for masking, spread in report["metrics"].items():
        model = [f"{spread[name]['mean']:.4f} ± {spread[name]['std']:.4f}" for name in names]
        rows = [(report["preset"], *model)]
        rows += [
            (who, *(f"{found[masking][name]:.4f}" for name in names)) for who, found in report["baselines"].items()
        ]
        if masking == "masked":
            rows += [
                (who, *(f"{found[name]['mean']:.4f} ± {found[name]['std']:.4f}" for name in names))
                for who, found in report["controls"].items()
            ]
        asked = (
            f"{report['questions']} of {report['users']}" if report["questions"] < report["users"] else report["users"]
        )
        title = f"{report['data']}, {report['split']}, {asked} questions, seeds {report['seeds']}"
        parts.append(table(rows, [f"seen {masking}", *names], title=title))
    apart = [
        (who, *(f"{found[name]['mean']:+.4f} ± {found[name]['error']:.4f}" for name in names))
        for who, found in report["differences"].items()
    ]
    parts.append(table(apart, ["ahead of, seen masked", *names], title="paired differences and their standard errors"))
    if report["adapted"]:
        parts.append(f"trained with the towers: the encoder of {' and of '.join(report['adapted'])}")
    return "\n\n".join(parts)


def require_schema(connection: Any) -> None:
    """Raises UserError when the database holds no tables of ours yet."""
    row = connection.execute("select to_regclass('polytower.items')").fetchone()
    if row[0] is None:
        raise UserError("the database is empty: run `polytower load DIR` (or `polytower init`) first")


def _asked(questions: int, users: int) -> str:
    return f"{questions} of {users}" if questions < users else str(users)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
