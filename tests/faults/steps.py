"""The steps of the flow that are killed: which command, when its work begins and ends, what it was at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.checks import Fault
from tests.faults.data import Batch
from tests.faults.home import Command, Home

MATERIALIZE = ("materialize", "--preset", "tiny")
# Phases by the newest statement (or, without one that is told here, the files of the training).
STATEMENTS = (
    (r"^commit", "commit"),
    (r"polytower\.load", "lock of the load"),
    (r"^\s*copy staged_|^\s*copy .*staged", "COPY of the load"),
    (r"(?s)insert into .*staged_|delete from staged_|update staged_|^analyze", "checks and upsert of the load"),
    (r"attach partition .*interactions_y|create table .*interactions_y", "new year's partition"),
    (r"content_staging|insert into content_embeddings", "writing of content embeddings"),
    (r"missing_content", "encoding"),
    (r"content_encoders", "registry of encoders"),
    (r"select exists \(select from items", "loading of an encoder"),
    (r"^copy \(", "reading of the training set"),
    (r"(?i)^\s*copy .*_g\d+", "COPY of the generation"),
    (r"create index .*hnsw", "HNSW index"),
    (r"attach partition|add primary key|generation_check|analyze .*_g\d+", "attach"),
    (r"towers", "towers"),
    (r"promotions|update generations set state = '(live|retired)'", "promotion"),
    (r"set state = 'ready'", "ready"),
    (r"(?i)item_embeddings|user_interests|retrieve_vectors|live_generation|neighbour", "gates"),
    (r"(?i)create (table|function|index|view|type)|alembic|comment on", "migration"),
)


@dataclass(frozen=True)
class Step:
    """begin, end: regular expressions (see Command.shows) of the work; an empty end is the end of the process.

    placed: whether a run that ended has put every item into the live generation. pictures: new items of a round, edge:
    their size in pixels, events: new ones.
    """

    name: str
    begin: str
    end: str = ""
    items: int = 4
    edge: int = 64
    events: int = 300
    placed: bool = True

    def command(self, batch: Batch) -> tuple[str, ...]:
        """What to run."""
        return batch.arguments if self.name == "load" else MATERIALIZE


LOAD = Step("load", r"polytower\.load|staged_|into loads", items=12, edge=400, events=8000, placed=False)
ENCODE = Step("encode", r"user sequences .* with children$", r"(?m)^ +content embeddings ", items=64, edge=600)
TRAIN = Step("train", r"(?m)^ +training set ", r"(?m)^ +checkpoint ", events=1500)
BUILD = Step("build", r"(?m)^ +checkpoint ", r"(?m)^ +live generation ", events=1500)
PROMOTE = Step("promote", r"\w", placed=False)  # its first statement of all: the transaction is milliseconds long
STEPS = (LOAD, ENCODE, TRAIN, BUILD)


def phase(home: Home, step: Step) -> str:
    """What the step is at, in a few words: its newest statement, the training's files."""
    statements = [(state, query) for _, state, query in home.statements()]
    if step is TRAIN and not any(state == "active" for state, _ in statements):
        return training_phase(home)
    for _, query in statements:
        for sign, name in STATEMENTS:
            if re.search(sign, query.strip()):
                return name
    return " ".join(statements[0][1].split())[:44] if statements else "between connections"


def training_phase(home: Home) -> str:
    """How far the newest checkpoint folder is."""
    folders = sorted((home.folder / "checkpoints").glob("*/"), key=lambda path: path.stat().st_mtime)
    if not folders or (folders[-1] / "summary.json").exists():
        return "reading of the training set"
    for name, what in (
        ("evaluated/towers.json", "summary"), ("towers.json", "saving"),
        ("refit/state.safetensors", "epochs of the refit"), ("state.safetensors", "epochs"),
        ("snapshot.safetensors", "first epoch"),
    ):  # fmt: skip
        if (folders[-1] / name).exists():
            return what
    return "snapshot"


def ended_well(command: Command, expected: Sequence[int] = (0,)) -> list[Fault]:
    """Whether a command that ended did so with an expected status, and with a message where it failed."""
    status, said = command.process.returncode, command.said()
    name = " ".join(command.arguments[:2])
    faults = []
    if "Traceback" in said:
        lines = [line for line in said.splitlines() if line.strip()]
        faults.append(Fault("stuck", f"{name} ends with a traceback, not a message: {lines[-1][:160]}"))
    if status not in expected:
        faults.append(Fault("stuck", f"{name} ends with {status}: {said.strip()[-300:]}"))
    return faults
