"""From a checkpoint to a generation: every item and user embedded, stored, indexed and checked, ready to promote."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from encoders.catalogue import Catalogue, Histories, IntArray
from pipelines.generation import lifecycle, quality
from pipelines.generation.partitions import InterestRows, fill, halfvecs, store_tower
from pipelines.generation.seal import seal
from pipelines.generation.search_depth import tune
from pipelines.generation.training import Checkpoint, aligned, read_checkpoint, read_snapshot
from pipelines.generation.training_set import TrainingSet, read_training_set

if TYPE_CHECKING:
    from encoders.towers.model import Model

# Users embedded at once: at 50 events of 64 dimensions about 13 MB.
USER_CHUNK = 1024


def build(
    connection: psycopg.Connection[Any], directory: Path, *, progress: bool = False, take_over: bool = False
) -> int:
    """Builds a generation from a checkpoint folder over today's items and histories, and runs the quality gates.

    Items that came after the training are cold: their content embedding serves. A checkpoint that was trained before a
    moment gets the histories of that moment, too. Where training adapted encoders, these must have encoded the
    catalogue (`adapted.encode_adapted`). An identical generation that is still there is returned instead. Returns its
    number, in state ready (or live). Any failure leaves it failed and dropped. take_over: from another process that
    builds.
    """
    checkpoint = read_checkpoint(directory)
    reads = checkpoint.towers
    training_set = read_training_set(
        connection,
        reads.user_attributes,
        queries="queries" in reads.reads,
        before=checkpoint.before,
        instead=checkpoint.adapters,
    )
    identity = _identity(checkpoint, training_set)
    with lifecycle.exclusive(connection, take_over=take_over):
        kept = _kept(connection, identity)
        if kept is not None:
            return kept
        towers = _towers(checkpoint, training_set.catalogue)
        generation = lifecycle.begin(
            connection, dim=towers.config.dim, interests=towers.config.interests, config=identity,
            metrics={"validation": dict(checkpoint.metrics)},
            checkpoint_path=str(directory), checkpoint_sha256=checkpoint.sha256, trained_before=checkpoint.before,
        )  # fmt: skip
        try:
            _fill_from(connection, generation, towers, training_set, progress=progress)
            lifecycle.ready(connection, generation, _quality(connection, generation))
        except BaseException as error:
            if connection.closed:  # another run took over: it sweeps up what this one had begun
                raise
            connection.rollback()
            lifecycle.fail(connection, generation, f"{type(error).__name__}: {error}")
            raise
    return generation


def _identity(checkpoint: Checkpoint, training_set: TrainingSet) -> dict[str, Any]:
    """What decides a generation's content: equal identities make equal generations."""
    read = {name for name, _ in checkpoint.towers.modalities}
    return {
        "preset": checkpoint.preset,
        **({"options": dict(checkpoint.options)} if checkpoint.options else {}),
        **({"before": checkpoint.trained_before} if checkpoint.trained_before else {}),
        **({"start": checkpoint.start} if checkpoint.start else {}),
        "checkpoint": checkpoint.sha256,
        "encoders": {name: revision for name, revision in training_set.encoders.items() if name in read},
        "catalogue": training_set.catalogue.fingerprint(),
        "histories": training_set.histories.fingerprint(*checkpoint.towers.reads),
        "until": training_set.until,
    }


def _kept(connection: psycopg.Connection[Any], identity: Mapping[str, Any]) -> int | None:
    for found in lifecycle.listing(connection):
        same = found.config == identity and found.state in ("ready", "live", "retired")
        if same and lifecycle.has_partitions(connection, found.generation):
            return found.generation
    return None


def _quality(connection: psycopg.Connection[Any], generation: int) -> dict[str, Any]:
    """What promotion looks at (every gate's value beside its threshold, whether the hard ones hold), and serving."""
    sealed = seal(connection, generation)  # before the gates: what is changed meanwhile is not promoted
    gates = quality.generation_gates(connection, generation)
    passed = all(gate.passed for gate in gates if gate.severity == "error")
    return {
        "passed": passed,
        "gates": [gate.as_json() for gate in gates],
        "seal": sealed,
        "index": tune(connection, generation),
    }


def _towers(checkpoint: Checkpoint, catalogue: Catalogue) -> "Model":
    """The checkpoint's towers over today's catalogue: known items keep their ID row, others are cold."""
    from encoders.towers.families import FAMILIES
    from encoders.training.checkpoint import load

    if not FAMILIES[checkpoint.towers.family].by_id:
        return load(checkpoint.directory, catalogue)[0]
    trained_ids, _ = read_snapshot(checkpoint.directory)
    towers, _, _ = load(checkpoint.directory, aligned(catalogue, trained_ids))
    return towers.over(trained_ids, catalogue)


def _fill_from(
    connection: psycopg.Connection[Any], generation: int, towers: "Model", training_set: TrainingSet, *, progress: bool
) -> None:
    from encoders.content.adapters import describe
    from encoders.training.checkpoint import content_tower_bytes, user_tower_bytes

    items = towers.item_embeddings()
    usable = (items.has_content | items.has_id).numpy()
    ids = (item_id for item_id, kept in zip(training_set.catalogue.item_ids, usable, strict=True) if kept)
    columns = [
        halfvecs(vectors.numpy()[usable], valid.numpy()[usable])
        for vectors, valid in (
            (items.item, items.has_content | items.has_id),
            (items.content, items.has_content),
            (items.id, items.has_id),
        )
    ]
    interests = interest_rows(towers, items.item, training_set.histories, progress=progress)
    fill(connection, generation, zip(ids, *columns, strict=True), interests)
    weights, config = user_tower_bytes(towers)
    store_tower(connection, generation, "user_tower", weights, config)
    content = content_tower_bytes(towers)
    if content is not None:  # a query by text or picture goes through it
        store_tower(connection, generation, "content", *content)
    for name, adapter in towers.adapters.items():  # and before that through the encoder with its adapter
        store_tower(connection, generation, f"adapter_{name}", adapter, describe(adapter))


def interest_rows(towers: "Model", items_VD: Any, histories: Histories, *, progress: bool) -> Iterator[InterestRows]:
    """The interests of every user, some users at a time; interests that are not in use are left out.

    as_of: the user's newest event; 1970 for a user who is known by attributes alone. events: how many were known.
    """
    from tqdm import tqdm

    from encoders.evaluation.evaluate import context_of, padded

    lengths = histories.lengths
    order = np.argsort(lengths, kind="stable")  # users of like length together: little padding
    with tqdm(total=len(order), desc="interests", unit="user", disable=None if progress else True) as bar:
        for start in range(0, len(order), USER_CHUNK):
            chosen = histories.select(order[start : start + USER_CHUNK])
            rows, mask = padded(chosen, towers.config.history)
            found = towers.user_interests(towers.events(rows, items_VD), mask, context_of(chosen, towers.config))
            weights = found.weights.numpy()
            users, interests = np.nonzero(weights > 0)
            yield InterestRows(
                [chosen.user_ids[user] for user in users],
                interests,
                found.vectors.numpy()[users, interests],
                weights[users, interests],
                _newest(chosen)[users],
                chosen.lengths[users],
            )
            bar.update(len(chosen))


def _newest(histories: Histories) -> IntArray:
    """Time of each user's newest event, microseconds since 1970; 0 for a user without any."""
    newest = np.zeros(len(histories), np.int64)
    begun = histories.lengths > 0
    newest[begun] = histories.times[histories.offsets[1:][begun] - 1]
    return newest
