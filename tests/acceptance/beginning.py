"""From an empty home to a live generation: every count of the tables is held against the files."""

import math
from typing import Any

from tests.acceptance.world import World, check, equal

TABLES = ("items", "users", "interactions")
# The towers' content space tells tastes apart, which titles of one taste share; it only warns.
WARNED = {"generation.title_recall_content"}


def initialise(world: World) -> None:
    """`polytower init`, and a doctor who finds nothing."""
    world.seen["revision"] = world.run("init")["revision"]
    missing = [found["name"] for found in world.run("doctor") if not found["ok"]]
    equal("what the doctor misses", missing, [])


def load(world: World) -> None:
    """The folder's rows are in the tables, each once."""
    counts = _load(world)
    facts = world.facts
    for table in TABLES:
        if facts.rows[table]:
            equal(f"{table} read", counts[f"{table}_read"], facts.rows[table])
    rejected = {table: counts.get(f"{table}_rejected", 0) for table in TABLES}
    if world.generated:
        equal("rows put aside", sum(rejected.values()), 0)
    held = {table: world.number(f"select count(*) from {table}") for table in TABLES}
    equal("items", held["items"], len(facts.items) - rejected["items"])
    equal("users", held["users"], len(set(facts.users["user_id"])) - rejected["users"])
    lost = len(facts.log) - held["interactions"]
    check(0 <= lost <= rejected["interactions"], f"{lost} of {len(facts.log)} different events are not in the table")
    equal("pictures taken", counts.get("items_images", 0), facts.pictures if world.images else 0)
    world.seen |= held | {"rejected": sum(rejected.values())}


def load_again(world: World) -> None:
    """The same folder again changes nothing."""
    counts = _load(world)
    changes = {name: count for name, count in counts.items() if name.endswith(("_new", "_changed")) and count}
    equal("changes of a second load", changes, {})


def materialize(world: World) -> None:
    """Sequences, embeddings, interests: as many as the files say, and every gate holds."""
    options: list[str] = [f"--set={name}={value}" for name, value in world.options.items()]
    done = world.run("materialize", "--preset", world.preset, *options)
    equal("generation", done["generation"], 1)
    failed = sorted(name for name, passed in done["checks"].items() if not passed)
    if world.generated:
        equal("failed checks", sorted({*failed} - WARNED), [])
    world.seen["failed checks"] = ", ".join(failed) or "none"
    _sequences(world)
    _content(world, done["assets"]["content_embeddings"])
    _generation(world)
    world.seen |= {f"{step} s": round(seconds, 1) for step, seconds in done["seconds"].items() if seconds >= 1}


def evaluate(world: World) -> None:
    """The model ranks the held-out items better than popularity does."""
    report = world.run("evaluate")
    equal("users asked", report["questions"], world.facts.asked)
    found = {"model": report["metrics"]["masked"], "popularity": report["baselines"]["popularity"]["masked"]}
    for who, metrics in found.items():
        check(all(map(math.isfinite, metrics.values())), f"metrics of {who}: {metrics}")
        world.seen[f"ndcg@10 of {who}"] = round(metrics["ndcg@10"], 4)
    check(
        found["model"]["ndcg@10"] > found["popularity"]["ndcg@10"],
        f"NDCG@10 {found['model']['ndcg@10']:.4f}, popularity's is {found['popularity']['ndcg@10']:.4f}",
    )


def _load(world: World) -> dict[str, int]:
    images = ["--images", str(world.images)] if world.images else []
    # 3: the rest was loaded, some rows were put aside; real data may have such rows.
    report = world.run("load", world.folder, *images, statuses=(0,) if world.generated else (0, 3))
    return dict(report["counts"])


def _sequences(world: World) -> None:
    if not world.number("select count(*) from rejected_rows"):
        equal("user days", world.number("select count(*) from user_sequences"), world.facts.active_days("user_id"))
        equal("item days", world.number("select count(*) from item_stats"), world.facts.active_days("item_id"))
    for user in world.facts.some_users(20):
        ((newest,),) = world.sql(
            "select item_ids from user_sequences where user_id = %s order by as_of desc limit 1", [user]
        )
        equal(f"the newest sequence of {user}", newest, world.facts.sequence(user)[-len(newest) :])


def _content(world: World, reported: dict[str, Any]) -> None:
    expected = {"attributes": world.facts.attributes, "text": world.facts.texts}
    if world.images:
        expected["image"] = world.facts.pictures
    held = dict(world.sql("select modality, count(*) from content_embeddings group by modality"))
    equal("content embeddings", held, {modality: count for modality, count in expected.items() if count})
    equal("encoded", reported["encoded"], sum(held.values()))
    world.seen["content embeddings"] = sum(held.values())


def _generation(world: World) -> None:
    embedded = "select count(*) from item_embeddings join live_generation using (generation)"
    meant = """select count(*) from items i where exists (select from content_embeddings where item_id = i.item_id)
               or exists (select from interactions where item_id = i.item_id)"""
    equal("item embeddings", world.number(embedded), world.number(meant))
    users = world.facts.active | (world.facts.described_users if "towers.user_attributes" in world.options else set())
    rows = world.sql(
        """select user_id, array_agg(interest order by interest), sum(weight),
                  max(abs(1 - l2_norm(embedding)))
           from user_interests join live_generation using (generation) group by user_id"""
    )
    equal("users with interests", len({row[0] for row in rows} ^ users), 0)
    world.seen |= {"item embeddings": world.number(embedded), "users with interests": len(rows)}
    worst = max(float(row[3]) for row in rows)
    check(worst < 0.01, f"an interest's length is off by {worst:.3f}")
    weights = [float(row[2]) for row in rows]
    check(0.99 < min(weights) <= max(weights) < 1.01, f"weights of a user sum to {min(weights)} to {max(weights)}")
