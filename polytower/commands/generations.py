"""`polytower generations`: list, judge, promote, roll back, compare, drop and retain."""

import sys
from dataclasses import asdict

import click

from polytower.commands.output import AS_JSON, answer, require_schema, table
from polytower.errors import UserError


@click.group()
def generations() -> None:
    """List, judge, promote, roll back, compare, drop and retain generations."""


@generations.command("list")
@AS_JSON
def list_generations(as_json: bool) -> None:
    """List all generations, newest first."""
    from pipelines.generation.lifecycle import listing
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = listing(connection)
    rows = [
        (g.generation, g.state, g.config.get("preset"), g.interests, g.dim, f"{g.created_at:%Y-%m-%d %H:%M}",
         f"{g.trained_before:%Y-%m-%d %H:%M}" if g.trained_before else "",
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
        "trained before (UTC)",
        "validation NDCG@10",
        "gates passed",
    ]
    answer([g.as_json() for g in found], as_json=as_json, text=table(rows, columns) if rows else "no generations yet")


@generations.command()
@click.argument("generation", type=int, required=False)
@AS_JSON
def quality(generation: int | None, as_json: bool) -> None:
    """Show every gate of GENERATION (default: the live one): its number, its bound, and what a failure means.

    Exit status: 0 if no blocking gate failed, 1 otherwise.
    """
    from pipelines.generation import lifecycle
    from pipelines.generation.meanings import MEANINGS
    from pipelines.generation.seal import words
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = lifecycle.get(connection, generation) if generation is not None else lifecycle.live(connection)
    if found is None:
        raise UserError("no generation is live; name one: `polytower generations list` shows those that exist")
    gates = found.quality.get("gates", [])
    rows = [
        ("yes" if gate["passed"] else "NO" if gate["severity"] == "error" else "warns", gate["name"],
         "not measured" if gate["value"] is None else f"{float(gate['value']):.4g}",
         f"{gate['bound']} {gate['threshold']:.4g}")
        for gate in gates
    ]  # fmt: skip
    failed = [gate for gate in gates if not gate["passed"]]
    sealed = [f"{part}: {words(sealed)}" for part, sealed in found.quality.get("seal", {}).items()]
    text = table(rows, ["passed", "gate", "value", "needs"], f"generation {found.generation}, {found.state}")
    reasons = [f"{gate['name']}: {MEANINGS.get(gate['name'], 'of an earlier version')}" for gate in failed]
    answer(found.quality | {"generation": found.generation}, as_json=as_json, text="\n".join([text, *reasons, *sealed]))
    if any(gate["severity"] == "error" for gate in failed):
        sys.exit(1)


@generations.command()
@click.argument("generation", type=int)
@click.option("--force", is_flag=True, help="Promote even if a blocking quality gate failed.")
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
    """Go back to the generation that was live before."""
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
    """Show what changed from OLDER to NEWER: items, users, nearest neighbours, metrics."""
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
    answer({"dropped": generation}, as_json=as_json, text=f"generation {generation}'s vectors are deleted")


@generations.command()
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    required=True,
    help="How many generations to keep besides the live one; 0 leaves none to roll back to.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")
@AS_JSON
def retain(keep: int, dry_run: bool, as_json: bool) -> None:
    """Delete the vectors of all but the live generation and the newest ones besides it; their records stay."""
    from pipelines.generation import lifecycle
    from polytower.postgres import connect

    with connect() as connection:
        require_schema(connection)
        found = (lifecycle.surplus if dry_run else lifecycle.retain)(connection, keep)
    freed = sum(each.bytes for each in found)
    verb = "would be freed" if dry_run else "freed"
    rows = [(each.generation, each.state, f"{each.bytes / 2**20:,.1f}") for each in found]
    listed = table(rows, ["generation", "state", "MiB"]) + f"\n{freed / 2**20:,.1f} MiB {verb}"
    answer(
        {"dry_run": dry_run, "generations": [asdict(each) for each in found], "bytes": freed},
        as_json=as_json,
        text=listed if rows else "nothing to delete",
    )
