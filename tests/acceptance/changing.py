"""What changes afterwards: events, a second load and generation (by Dagster), rollback, a restart of the server."""

import json
from datetime import UTC, datetime, timedelta
from typing import get_args

import pandas as pd

from feature_repo.schema import RETRIEVAL_SERVICE
from polytower.client import Interaction, Merge
from tests.acceptance.agreeing import same, sound
from tests.acceptance.asking import K, agree, by_sql
from tests.acceptance.folder import NEW_ITEM, NEW_USER, write_second
from tests.acceptance.world import World, check, equal

POSTED_USER = "acceptance-posted"
ITEM = "select title, description, attributes, image, available from items where item_id = %s"


def posted(world: World) -> None:
    """Somebody new posts events, and the next answer knows them; sent again they count once."""
    history = world.facts.sequence(world.facts.some_users(3)[0])[:8]
    now = datetime.now(UTC) - timedelta(minutes=len(history))
    events = [
        Interaction(
            user_id=POSTED_USER, item_id=item, event_id=f"accept-{place}", occurred_at=now + timedelta(minutes=place)
        )
        for place, item in enumerate(history)
    ]
    equal("accepted", world.client.interact(events), (len(events), 0))
    equal("accepted a second time", world.client.interact(events), (0, len(events)))
    answer = world.client.retrieve(user_id=POSTED_USER, k=K)
    equal("interests of somebody new", (answer.interests, answer.degraded), ("online", None))
    sound("somebody new", answer.candidates, K, without=history)
    known = world.facts.some_users(3)[1]
    before = world.client.retrieve(user_id=known, k=K)
    seen = before.candidates[0].item_id
    world.client.interact([Interaction(user_id=known, item_id=seen, event_id="accept-known")])
    after = world.client.retrieve(user_id=known, k=K)
    equal(f"interests of {known} after a new event", after.interests, "online")
    sound(f"{known} after a new event", after.candidates, K, without=[seen])


def load_changes(world: World) -> None:
    """A second folder: one new item, one corrected title, one new user; nothing else changes."""
    twin = _twin(world)
    title, description, attributes, _, _ = world.sql(ITEM, [twin])[0]
    corrected = next(item for item in world.facts.sequence(world.facts.some_users(3)[0]) if item != twin)
    old, told, known, image, available = world.sql(ITEM, [corrected])[0]
    retitled = {"item_id": corrected, "title": f"{old or corrected} (revised)", "description": told, "image": image}
    folder = world.home / "second"
    history = world.facts.sequence(world.facts.some_users(3)[1])[:10]
    last = world.sql("select max(occurred_at) from interactions where occurred_at < now() - interval '1 day'")[0][0]
    write_second(
        folder,
        {"title": title, "description": description, **attributes},
        history,
        pd.Timestamp(last or datetime.now(UTC)),
        retitled | {"available": available} | known,
    )
    counts = world.run("load", folder)["counts"]
    equal("items of the second load", [counts[f"items_{what}"] for what in ("new", "changed", "rejected")], [1, 1, 0])
    equal("rows put aside", counts["interactions_rejected"], 0)
    equal("new events", counts["interactions_new"], len(history))


def second_generation(world: World) -> None:
    """Dagster's job `full`, as its scheduler runs it: the new item and users are in generation 2, which goes live."""
    before = _embedded(world)
    path = world.home / "full.json"
    config = {"ops": {"run_everything": {"config": {"preset": "", "options": {}}}}}
    path.write_text(json.dumps(config))
    world.text("dagster", "job", "execute", "-m", "pipelines.orchestration.definitions", "-j", "full", "-c", path)
    states = {each["generation"]: each["state"] for each in world.run("generations", "list")}
    equal("states", states, {1: "retired", 2: "live"})
    equal("newly encoded or corrected", _embedded(world) - before, world.number(NEWLY, [NEW_ITEM]))
    found = world.run("generations", "diff", "1", "2")
    equal("items added, removed", (found["items"]["added"], found["items"]["removed"]), (1, 0))
    equal("users added, removed", (found["users"]["added"], found["users"]["removed"]), (2, 0))
    world.seen["changed neighbours"] = round(found["neighbour_churn"], 3)


NEWLY = "select count(*) from content_embeddings where item_id = %s"


def new_item(world: World) -> None:
    """The item that nobody has met is retrieved: near to its twin, by its own text, and for a user."""
    _until(world, 2)
    twin = _twin(world)
    alike = world.client.similar(twin, k=50, space="content")
    same_content = [row for row in alike if row.score > 0.99]
    mine = [row for row in world.client.similar(NEW_ITEM, k=50, space="content") if row.score > 0.99]
    check(len(mine) == 50 or twin in [row.item_id for row in mine], f"the new item is not near its twin: {mine[:3]}")
    check(
        len(same_content) == 50 or NEW_ITEM in [row.item_id for row in same_content],
        f"the twin is not near the new item: {same_content[:3]}",
    )
    user = world.facts.some_users(3)[1]
    only = world.client.retrieve(user_id=user, k=K, allow=[NEW_ITEM])
    equal("the new item for a user", [row.item_id for row in only.candidates], [NEW_ITEM])
    title, description = world.sql(ITEM, [NEW_ITEM])[0][:2]
    text = " ".join(filter(None, (title, description)))
    if text:
        asked = world.client.retrieve(text=text, k=K, allow=[NEW_ITEM, *world.facts.items["item_id"][:200]])
        check(bool(asked.candidates), "nothing is found by the new item's text")


def new_users(world: World) -> None:
    """Who was loaded and who posted have stored interests now, and the log of both."""
    for user in (NEW_USER, POSTED_USER):
        answer = world.client.retrieve(user_id=user, k=K)
        equal(f"interests of {user}", (answer.generation, answer.interests, answer.degraded), (2, "stored", None))
        agree(world, user, by_sql(world, user), answer.candidates)
        logged = world.sql("select item_id from interactions where user_id = %s order by occurred_at, position", [user])
        table = world.client.features(RETRIEVAL_SERVICE, user_id=[user])
        equal(f"sequence feature of {user}", table.column("item_ids").to_pylist(), [[item for (item,) in logged]])


def roll_back(world: World) -> None:
    """Back to generation 1, which knows nothing of the new item; and forward again. The running server follows."""
    equal("live after a rollback", world.run("generations", "rollback")["live"], 1)
    _until(world, 1)
    equal(
        "new item in generation 1", world.client.retrieve(user_id=_known(world), k=K, allow=[NEW_ITEM]).candidates, []
    )
    equal("live after a promotion", world.run("generations", "promote", "2")["live"], 2)
    _until(world, 2)
    equal("promotions", world.number("select count(*) from promotions"), 4)


def restart(world: World) -> None:
    """The server goes in peace; a new one, without an index in memory, gives the answers of SQL and command line."""
    user = _known(world)
    before = world.client.retrieve(user_id=user, k=K).candidates
    world.stop_server()
    world.start_server(POLYTOWER_INDEX_MB="0")
    after = world.client.retrieve(user_id=user, k=K).candidates
    agree(world, "after a restart", after, before)
    for merge in get_args(Merge):
        if merge == "diverse":
            continue
        by_http = world.client.retrieve(user_id=user, k=K, merge=merge).candidates
        same(f"HTTP and SQL, {merge}", by_http, by_sql(world, user, merge=merge), tolerance=1e-6)
        told = world.run("retrieve", user, "-k", K, "--merge", merge)["candidates"]
        same(f"HTTP and the command line, {merge}", by_http, told, tolerance=1e-6)
    quoted = user.replace("'", "''")
    statement = f"select item_id from polytower.retrieve('{quoted}', {K}) order by rank"
    listed = world.text("db", "psql", "-At", "-c", statement).splitlines()
    equal("psql", listed, [row.item_id for row in world.client.retrieve(user_id=user, k=K).candidates])


def end(world: World) -> None:
    """The server goes in peace."""
    world.stop_server()


def _until(world: World, generation: int) -> None:
    """Held against the server: who asks after a promotion gets the generation that was promoted."""
    answer = world.client.retrieve(user_id=_known(world), k=K)
    equal("generation that the server answers from", answer.generation, generation)


def _known(world: World) -> str:
    return world.facts.some_users(3)[1]


def _twin(world: World) -> str:
    """The item whose text and attributes the new item has: without a picture, so that nothing else tells them apart."""
    statement = """select item_id from items where item_id <> %s
                   order by image_path is not null, title is null, item_id limit 1"""
    return str(world.sql(statement, [NEW_ITEM])[0][0])


def _embedded(world: World) -> int:
    return world.number("select count(*) from content_embeddings")
