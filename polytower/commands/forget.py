"""`polytower forget`: erase a user or an item, everywhere, for good."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from polytower.commands.output import AS_JSON, answer, require_schema, table
from polytower.errors import UserError

if TYPE_CHECKING:
    from pipelines.forget import EntityName

LIFT = click.option(
    "--lift",
    is_flag=True,
    help="Remove nothing; take the id off the list of the forgotten, so that loads may bring it again.",
)
YES = click.option("--yes", is_flag=True, help="Do not ask. What is removed does not come back.")
LEFT = {
    "user": "the trained weights hold no row of a user; the next `polytower materialize` corrects items' counts",
    "item": "a checkpoint's weights keep the item's row, without its name, until the next training; its picture on"
    " disk is the source's and stays",
}


@click.group()
def forget() -> None:
    """Erase a user or an item: log, features, every generation, checkpoints, rejected rows; loads leave it out.

    Running servers answer without it from the next question on. Backups, Postgres's own log and Dagster's history of
    check results (which may name a row as a sample) are not touched.
    """


def _command(entity: "EntityName") -> Callable[..., None]:
    @YES
    @LIFT
    @AS_JSON
    def run(entity_id: str, yes: bool, lift: bool, as_json: bool) -> None:
        from pipelines import forget as erasure
        from polytower.postgres import connect

        with connect() as connection:
            require_schema(connection)
            if lift:
                if not erasure.lift(connection, entity, entity_id):
                    raise UserError(f"the {entity} {entity_id!r} is not on the list of the forgotten")
                answer(
                    {entity: entity_id, "lifted": True}, as_json=as_json, text=f"loads may bring {entity_id!r} again"
                )
                return
            if not yes:
                click.confirm(f"erase the {entity} {entity_id!r} for good?", abort=True, err=True)
            found = erasure.forget(connection, entity, entity_id)
        rows = [(place, found.removed.get(place, 0), found.remaining.get(place, 0)) for place in found.removed]
        text = table(rows, ["place", "rows removed", "left"])
        answer(
            {entity: entity_id} | found.as_json(),
            as_json=as_json,
            text=f"{text}\n\n{LEFT[entity]}\nto see for yourself:\n{found.proof};",
        )

    return run


forget.command("user", help="Erase the user of this id.")(click.argument("entity_id", metavar="ID")(_command("user")))
forget.command("item", help="Erase the item of this id.")(click.argument("entity_id", metavar="ID")(_command("item")))
