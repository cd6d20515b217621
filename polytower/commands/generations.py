"""`polytower generations`: list, promote, roll back, compare and drop."""

import click

from polytower.commands.output import AS_JSON, answer, require_schema, table


@click.group()
def generations() -> None:
    """List, promote, roll back, compare and drop generations."""


@generations.command("list")
@AS_JSON
def list_generations(as_json: bool) -> None:
    """All generations, newest first."""
    from pipelines.generation.lifecycle import listing
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = listing(connection)
    rows = [
        (g.generation, g.state, g.config.get("preset"), g.interests, g.dim, f"{g.created_at:%Y-%m-%d %H:%M}",
         g.metrics.get("validation", {}).get("ndcg@10"), g.quality.get("passed"))
        for g in found
    ]  # fmt: skip
    columns = [
        "generation",
        "state",
        "preset",
        "interests",
        "dim",
        "created (UTC)",
        "validation NDCG@10",
        "gates passed",
    ]
    answer([g.as_json() for g in found], as_json=as_json, text=table(rows, columns) if rows else "no generations yet")


@generations.command()
@click.argument("generation", type=int)
@click.option("--force", is_flag=True, help="Promote although a blocking quality gate failed.")
@AS_JSON
def promote(generation: int, force: bool, as_json: bool) -> None:
    """Make GENERATION the live one, in one transaction."""
    from pipelines.generation import lifecycle
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        before = lifecycle.promote(connection, generation, force=force)
    retired = before.generation if before else None
    answer({"live": generation, "before": retired}, as_json=as_json, text=f"generation {generation} is live")


@generations.command()
@AS_JSON
def rollback(as_json: bool) -> None:
    """Make the generation that was live before the live one again."""
    from pipelines.generation import lifecycle
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        now = lifecycle.rollback(connection)
    answer({"live": now.generation}, as_json=as_json, text=f"generation {now.generation} is live again")


@generations.command()
@click.argument("older", type=int)
@click.argument("newer", type=int)
@AS_JSON
def diff(older: int, newer: int, as_json: bool) -> None:
    """What changed from OLDER to NEWER: items, users, nearest neighbours, metrics."""
    from pipelines.generation import lifecycle
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = lifecycle.diff(connection, older, newer)
    rows = [(kind, *found[kind].values()) for kind in ("items", "users")]
    churn = "no common items" if found["neighbour_churn"] is None else f"{found['neighbour_churn']:.1%}"
    text = table(rows, ["", "added", "removed", "kept"]) + f"\nnearest neighbours that changed: {churn}"
    answer(found, as_json=as_json, text=text)


@generations.command()
@click.argument("generation", type=int)
@AS_JSON
def drop(generation: int, as_json: bool) -> None:
    """Delete a generation's vectors (never the live one's); its record stays."""
    from pipelines.generation import lifecycle
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        lifecycle.drop(connection, generation)
    answer({"dropped": generation}, as_json=as_json, text=f"generation {generation}'s vectors are gone")
