"""Every kind of question to the running server, which answers from memory; SQL and the command line must agree."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from feature_repo.schema import SPACES
from polytower.client import Answer, Merge, ProblemError, Question
from serving.memory.vector_index import EXACT_ITEMS
from tests.acceptance.agreeing import overlap, rows, same, sound
from tests.acceptance.generated import taste_of
from tests.acceptance.world import World, check, equal

K = 20
ENOUGH = 0.7  # of an exact answer's items, from an index: of twenty, three near ties count
RETRIEVE = """select item_id, score, rank, interest, interest_rank from polytower.retrieve(
    %(user)s, %(k)s, filter => %(filter)s, exclude_seen => %(exclude_seen)s, merge => %(merge)s,
    exclude => %(exclude)s::text[], allow => %(allow)s::text[], diversity => %(diversity)s) order by rank"""
EXACT = """with own as (
    select array_agg(embedding order by interest) as vectors, array_agg(weight order by interest) as weights
    from polytower.user_interests(%(user)s)
)
select r.item_id, r.score, r.rank from own cross join lateral polytower.retrieve_vectors(
    own.vectors, own.weights, %(k)s, exclude => polytower.seen_items(%(user)s), merge => %(merge)s, exact => true) r
order by r.rank"""
# The commonest value of an attribute, told by name; and how many may be recommended that have it.
COMMON = """select key, value from polytower.items, jsonb_each(attributes) as parts (key, listed),
    jsonb_array_elements(case jsonb_typeof(listed) when 'array' then listed else jsonb_build_array(listed) end) value
    where jsonb_typeof(value) = 'string' group by key, value order by count(*) desc, key, value limit 1"""
MATCHING = """select i.item_id from polytower.items i
    join polytower.item_embeddings e using (item_id) join polytower.live_generation using (generation)
    where i.available and (i.attributes -> %(key)s = %(value)s or i.attributes -> %(key)s @> %(value)s)"""


def serve(world: World) -> None:
    """The server comes up ready, over the live generation."""
    world.start_server()
    equal("generation that the server is ready with", world.client.ready(), 1)
    equal("states", [each["state"] for each in world.client.generations()], ["live"])


def users(world: World) -> None:
    """By user: memory = an exact scan in SQL, and the index finds it; nothing seen is recommended."""
    for user in world.facts.some_users(12):
        answer = world.client.retrieve(user_id=user, k=K)
        equal(f"interests of {user}", (answer.interests, answer.degraded), ("stored", None))
        _sound(world, f"user {user}", answer, world.facts.sequence(user))
        agree(world, f"user {user}, by a scan", by_sql(world, user, exact=True), answer.candidates)
        agree(world, f"user {user}, in SQL", by_sql(world, user), answer.candidates)
        again = world.client.retrieve(user_id=user, k=K, exclude_seen=False, found_by=False)
        sound(f"user {user}, seen ones too", again.candidates, K)
    if world.generated:
        _tastes(world)


def merges(world: World) -> None:
    """Every merge: memory = SQL."""
    user = world.facts.some_users(3)[1]
    key, _, _ = _attribute(world)
    for merge in get_args(Merge):
        diversity = {"attribute": key, "weight": 0.1} if merge == "diverse" and key else None
        if merge == "diverse" and not key:
            continue
        answer = world.client.retrieve(user_id=user, k=K, merge=merge, diversity=diversity)
        sound(merge, answer.candidates, K, without=world.facts.sequence(user))
        told = by_sql(world, user, merge=merge, diversity=diversity)
        agree(world, f"merge {merge}", told, answer.candidates)
        world.seen[merge] = f"{len(told)} agreed"


def narrowed(world: World) -> None:
    """Filters, allow-lists and exclusions hold, and do not shorten an answer."""
    user = world.facts.some_users(3)[1]
    key, value, matching = _attribute(world)
    if key:
        where = {key: value}
        answer = world.client.retrieve(user_id=user, k=K, filter=where)
        left = matching - set(world.facts.sequence(user))
        sound(f"filter {where}", answer.candidates, min(K, len(left)))
        strangers = {row.item_id for row in rows(answer.candidates)} - left
        equal(f"candidates beside the filter {where}", strangers, set())
        agree(world, f"filter {where}", by_sql(world, user, filter=where), answer.candidates)
        world.seen |= {"filter": json.dumps(where, ensure_ascii=False), "items that match": len(matching)}
    plain = [row.item_id for row in rows(world.client.retrieve(user_id=user, k=K).candidates)]
    allowed, banned = plain[::2], plain[:2]
    answer = world.client.retrieve(user_id=user, k=K, allow=allowed, exclude=banned)
    kept = [item for item in allowed if item not in banned]
    equal("allowed and not excluded", [row.item_id for row in rows(answer.candidates)], kept)
    same("allow and exclude", answer.candidates, by_sql(world, user, allow=allowed, exclude=banned))


def vectors(world: World) -> None:
    """By vectors: the user's own interests bring the user's own answer."""
    user = world.facts.some_users(3)[1]
    interests = world.client.interests(user)
    own, weights = np.stack([each.embedding for each in interests]), [each.weight for each in interests]
    stored = world.client.retrieve(user_id=user, k=K, merge="quota")
    seen = tuple(set(world.facts.sequence(user)))
    given = world.client.retrieve(vectors=own, weights=weights, k=K, merge="quota", exclude=seen)
    same("a user and the user's vectors", stored.candidates, given.candidates)
    for other in world.facts.some_users(12):
        vector = world.client.interests(other)[0].embedding
        nearest = world.sql("select item_id, score, rank from polytower.nearest(%s::halfvec, %s)", [_text(vector), K])
        agree(world, f"nearest to {other}", nearest, world.client.retrieve(vectors=vector[None], k=K).candidates)


def histories(world: World) -> None:
    """By a raw history: computed now, near to what is stored for it; by attributes alone where the towers read them."""
    for user in world.facts.some_users(4):
        history = world.facts.sequence(user)[-200:]
        answer = world.client.retrieve(history=history, k=K)
        equal("interests of a history", (answer.interests, answer.skipped), ("online", []))
        sound(f"history of {user}", answer.candidates, K, without=history)
    short = history[-5:]
    answer = world.client.retrieve(history=[*short, "never-heard-of"], k=K)
    equal("skipped", answer.skipped, ["never-heard-of"])
    told = world.run("retrieve", "--history", ",".join(short), "-k", K)["candidates"]
    agree(world, "a history on the command line", told, answer.candidates)
    if world.options:
        who = {name: value for name, value in _attributes_of(world).items() if value is not None}
        alone = world.client.retrieve(attributes=who, k=K)
        sound(f"somebody with {who}", alone.candidates, K)
        told = world.run("retrieve", "--attributes", json.dumps(who), "-k", K)["candidates"]
        agree(world, f"somebody with {who}, on the command line", told, alone.candidates)


def contents(world: World) -> None:
    """By text, by picture, by both: what was asked for is found, and the command line agrees."""
    item, text, picture = _described(world)
    questions: dict[str, tuple[Question, list[str]]] = {"text": (Question(text=text, k=K), ["--text", text])}
    if picture is not None:
        image = picture.read_bytes()
        questions["picture"] = (Question(image=image, k=K), ["--image", str(picture)])
        questions["both"] = (Question(text=text, image=image, k=K), ["--text", text, "--image", str(picture)])
    for name, (question, options) in questions.items():
        answer = world.client.retrieve(question)
        equal(f"interests by {name}", answer.interests, "content")
        sound(f"by {name}", answer.candidates, K)
        agree(world, f"by {name}", world.run("retrieve", *options, "-k", K)["candidates"], answer.candidates)
        if world.generated:
            share = float(np.mean([taste_of(row.item_id) == taste_of(item) for row in rows(answer.candidates)]))
            check(share >= 0.8, f"by {name} of {item}: {share:.2f} of the answers are of its taste")
            world.seen[f"of the taste, by {name}"] = round(share, 2)
        wide = world.client.retrieve(text=text, k=K, space="item")
        sound("by text among all that behaviour says", wide.candidates, K)


def batches(world: World) -> None:
    """A batch = its questions one by one; a bad question has its problem in its place."""
    some = world.facts.some_users(8)
    asked = [
        *(Question(user_id=user, k=K) for user in some),
        Question(user_id="nobody at all"),
        Question(history=["?"]),
    ]
    answers = world.client.retrieve_batch(asked)
    for question, answer in zip(asked[: len(some)], answers, strict=False):
        check(isinstance(answer, Answer), f"{question.user_id}: {answer}")
        assert isinstance(answer, Answer)
        same("a batch and a question", answer.candidates, world.client.retrieve(question).candidates)
    problems = [answer.slug for answer in answers[len(some) :] if isinstance(answer, ProblemError)]
    equal("problems of a batch", problems, ["unknown-user", "unknown-history"])


def neighbours(world: World) -> None:
    """Similar items in all spaces: HTTP = SQL = command line."""
    item = world.facts.sequence(world.facts.some_users(3)[1])[-1]
    for space in SPACES:
        found = world.client.similar(item, k=K, space=space)
        sound(f"similar to {item}, {space}", found, K, without=[item])
        statement = "select item_id, score, rank from polytower.similar_items(%s, %s, %s) order by rank"
        same(f"similar by {space}", found, world.sql(statement, [item, K, space]))
    same("similar on the command line", found, world.run("similar", item, "-k", K, "--space", space))
    if world.generated:
        alike = world.client.similar(item, k=K, space="content")
        share = float(np.mean([taste_of(row.item_id) == taste_of(item) for row in rows(alike)]))
        check(share >= 0.8, f"{share:.2f} of the items with like content are of the same taste")
        world.seen["of the taste, by content"] = round(share, 2)


def by_sql(world: World, user: str, *, exact: bool = False, **parts: Any) -> list[tuple[Any, ...]]:
    """The same question in SQL; exact: a scan instead of the index."""
    asked: dict[str, Any] = {"user": user, "k": K, "filter": {}, "exclude_seen": True, "merge": "max", "exclude": []}
    asked |= {"allow": None, "diversity": None} | parts
    for name in ("filter", "diversity"):
        asked[name] = None if asked[name] is None else json.dumps(asked[name])
    return world.sql(EXACT if exact else RETRIEVE, asked)


def _tastes(world: World) -> None:
    """Of all users, the recommended are of the taste that they love; chance, like popularity, gives a quarter."""
    shares = []
    for user in world.facts.some_users(200):
        found = world.client.retrieve(user_id=user, k=K, found_by=False).candidates
        shares.append(np.mean([taste_of(row.item_id) == taste_of(user) for row in rows(found)]))
    share = float(np.mean(shares))
    check(share > 0.6, f"only {share:.2f} of the recommended items are of the user's taste")
    world.seen["of the user's taste"] = round(share, 3)


def _sound(world: World, what: str, answer: Answer, seen: Sequence[str]) -> None:
    sound(what, answer.candidates, K, without=seen)
    scores = [row.score for row in rows(answer.candidates)]
    check(scores == sorted(scores, reverse=True), f"{what}: scores do not fall: {scores}")


def agree(world: World, what: str, told: Sequence[Any], found: Sequence[Any]) -> None:
    """SQL and memory both scan small catalogues, and answer the same; of large ones, each finds most."""
    if world.number("select count(*) from item_embeddings join live_generation using (generation)") <= EXACT_ITEMS:
        same(what, told, found)
    else:
        check(overlap(told, found) >= ENOUGH, f"{what}: SQL has {overlap(told, found):.2f} of the server's candidates")


def _attribute(world: World) -> tuple[str, str, set[str]]:
    """(name, value, items that have it) of the commonest text value; empty where no item has one."""
    found = world.sql(COMMON)
    if not found:
        return "", "", set()
    key, value = found[0]
    items = world.sql(MATCHING, {"key": key, "value": json.dumps(value)})
    return key, value, {item for (item,) in items}


def _attributes_of(world: World) -> dict[str, Any]:
    ((attributes,),) = world.sql("select attributes from users where attributes <> '{}' order by user_id limit 1")
    return dict(attributes)


def _described(world: World) -> tuple[str, str, Any]:
    """(id, text, picture's path or None) of an item that has as much of these as there is."""
    ((item, text, path),) = world.sql(
        """select item_id, concat_ws(' ', title, description), image_path from items
           where title <> '' order by image_path is null, item_id limit 1"""
    )
    return item, text, None if path is None else Path(path)


def _text(vector: Any) -> str:
    return "[" + ",".join(map(str, vector.tolist())) + "]"
