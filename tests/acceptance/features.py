"""Features of one service by every way: Feast online and historical, /v1/features as JSON and as Arrow."""

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np

from feature_repo.schema import RANKER_SERVICE
from tests.acceptance.asking import K
from tests.acceptance.world import StepError, World, check, equal

# Half floats and float32 on the way; texts and times must be equal.
TOLERANCE = 1e-3


Pairs = list[tuple[str, str, Any]]


def feast(world: World) -> None:
    """Feast's SDK = /v1/features as JSON = as Arrow, and they say what the log says; so do training rows."""
    pairs = _pairs(world)
    found = _feast(pairs)
    _online(world, pairs, found["online"])
    _historical(world, pairs, found["historical"])


def ranked(world: World) -> None:
    """Candidates with their features in one answer, as JSON and as Arrow."""
    user = world.facts.some_users(3)[1]
    answer = world.client.retrieve(user_id=user, k=K, features=RANKER_SERVICE, similarity=True)
    table = world.client.retrieve_table(user_id=user, k=K, features=RANKER_SERVICE, similarity=True)
    equal("candidates", table.column("item_id").to_pylist(), [each.item_id for each in answer.candidates])
    for row, candidate in zip(table.to_pylist(), answer.candidates, strict=True):
        features, similarity = candidate.features or {}, candidate.similarity or {}
        check(len(features) > 0, f"{candidate.item_id} came without features")
        for name, value in (features | similarity).items():
            _same(f"{name} of {candidate.item_id}", value, row[name])
        closest = similarity["interest_max"]
        check(abs(closest - candidate.score) < TOLERANCE, f"score {candidate.score}, closest interest {closest}")


def _online(world: World, pairs: Pairs, by_feast: dict[str, Any]) -> None:
    entities = {"user_id": [user for user, _, _ in pairs], "item_id": [item for _, item, _ in pairs]}
    assert world.server is not None
    answer = world.server.post("/v1/features", {"service": RANKER_SERVICE, "entities": entities})
    table = world.client.features(RANKER_SERVICE, similarity=True, relevant=None, **entities)
    names = [name for name in by_feast if name not in entities]
    check(len(names) > 20, f"the service has {len(names)} features: {names}")
    for name in names:
        column = table.column(name).to_pylist()
        for place, pair in enumerate(pairs):
            _same(f"{name} of {pair}, by Feast and as Arrow", by_feast[name][place], column[place])
            _same(f"{name} of {pair}, as JSON and as Arrow", answer["rows"][place][name], column[place])
    for place, (user, item, _) in enumerate(pairs):
        own = world.facts.sequence(user)
        equal(f"interactions of {user}", by_feast["user_interactions"][place], len(own))
        sequence = by_feast["item_ids"][place]
        equal(f"sequence of {user}", sequence, own[-len(sequence) :])
        met = int((world.facts.log["item_id"] == item).sum())
        equal(f"interactions of {item}", by_feast["item_interactions"][place], met)
        check(len(by_feast["embedding"][place]) > 0, f"{item} has no embedding")
    check("interest_max" in table.column_names, f"no similarities among {table.column_names}")
    world.seen |= {"features": len(names), "pairs": len(pairs)}


def _historical(world: World, pairs: Pairs, found: dict[str, Any]) -> None:
    """Point in time: a training row knows what came before its event, and never the event itself."""
    for place, (user, item, moment) in enumerate(pairs):
        equal("rows of a training set", (found["user_id"][place], found["item_id"][place]), (user, item))
        log = world.facts.log
        before = log[(log["user_id"] == user) & (log["occurred_at"] < moment)]
        expected = list(before.sort_values("occurred_at", kind="stable")["item_id"])
        sequence = _listed(found["item_ids"][place])
        check(
            bool(expected) == bool(sequence), f"{user} at {moment}: {len(sequence)} events of {len(expected)} before it"
        )
        equal(f"sequence of {user} at {moment}", sequence, expected[-len(sequence) :] if sequence else [])
    world.seen["training rows"] = len(pairs)


def _pairs(world: World) -> Pairs:
    """(user, item, moment) of the last event of users with longer and shorter histories."""
    found = []
    for user in world.facts.some_users(8):
        own = world.facts.log[world.facts.log["user_id"] == user].sort_values("occurred_at", kind="stable")
        found.append((user, str(own["item_id"].iloc[-1]), own["occurred_at"].iloc[-1]))
    return found


def _feast(pairs: Pairs) -> dict[str, Any]:
    body = json.dumps({"pairs": [(user, item, moment.isoformat()) for user, item, moment in pairs]})
    command = [sys.executable, "-m", "tests.acceptance.feast_user"]
    done = subprocess.run(command, input=body, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepError(f"Feast's SDK failed: {done.stderr[-2000:].strip()}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else []


def _same(what: str, one: Any, other: Any) -> None:
    if _numbers(one) and _numbers(other):
        near = np.allclose(np.atleast_1d(one), np.atleast_1d(other), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        check(np.size(one) == np.size(other) and bool(near), f"{what}: {one!r:.200} and {other!r:.200}")
    else:
        equal(what, _absent(one), _absent(other))


def _numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], float)
    return isinstance(value, float)


def _absent(value: Any) -> Any:
    """NaN is how a frame says that there is nothing."""
    return None if isinstance(value, float) and math.isnan(value) else value
