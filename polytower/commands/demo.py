"""`polytower demo`: the main job on MovieLens-100k, from a download to recommendations for a real user."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytower.commands.output import metrics_table, say, table
from polytower.settings import settings

if TYPE_CHECKING:
    from pipelines.generation.evaluation import EvaluationReport

HEADLINE = ("recall@10", "recall@50", "ndcg@10")
# Shown at the end: long enough to have tastes, short enough to read.
SHOWN_HISTORY = 6
SHOWN_CANDIDATES = 10
SHOWN_PER_INTEREST = 4

INTERESTS = """
select u.interest, u.weight, string_agg(coalesce(i.title, i.item_id), ' · ' order by r.rank)
from user_interests(%(user)s) u
cross join lateral retrieve_vectors(
    array[u.embedding], k => %(k)s, exclude => (select seen_items(%(user)s))) r
join items i using (item_id)
group by u.interest, u.weight order by u.interest
"""


@dataclass
class DemoReport:
    """What the demo did. seconds: by step, in order of execution."""

    generation: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    evaluation: "EvaluationReport | None" = None
    seconds: dict[str, float] = field(default_factory=dict)
    user: str = ""
    history: list[tuple[Any, ...]] = field(default_factory=list)
    candidates: list[tuple[Any, ...]] = field(default_factory=list)
    interests: list[tuple[Any, ...]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The machine-readable summary; metrics are of the test items, seen items masked."""
        assert self.evaluation is not None
        shown = {
            who: {name: found[name] for name in HEADLINE}
            for who, found in self.evaluation.contestants("masked").items()
        }
        return {
            "generation": self.generation,
            "counts": self.counts,
            "metrics": shown.pop("polytower"),
            "baselines": shown,
            "seconds": {step: round(seconds, 2) for step, seconds in self.seconds.items()},
        }

    def text(self) -> str:
        """The same for people: a real user's recommendations, the metrics beside the baselines, the times."""
        assert self.evaluation is not None
        whose = f"user {self.user}"
        columns = ["rank", "title", "genres", "score", "interest", "rank in it"]
        return "\n\n".join(
            [
                table(self.history, ["title", "genres"], title=f"{whose}: the {SHOWN_HISTORY} newest events"),
                table(self.candidates, columns, title=f"{whose}: recommended, from generation {self.generation}"),
                table(self.interests, ["interest", "weight", "nearest to it alone"], title=f"{whose}: interests"),
                metrics_table(self.evaluation),
                table([(step, f"{seconds:.1f}") for step, seconds in self.seconds.items()], ["step", "seconds"]),
                "next: polytower retrieve 1 | polytower similar 50 --space content | polytower serve | make dev",
            ]
        )


def run(*, images: Path | None, preset: str) -> DemoReport:
    """Runs every step; what an earlier run finished is found and kept.

    images: a folder of posters named by item id, which adds the image modality.
    """
    from pipelines.generation.evaluation import evaluate_generation
    from pipelines.load.folder import load_folder
    from pipelines.load.movielens import fetch_movielens_100k
    from pipelines.orchestration.materialize import materialize
    from polytower.postgres import connect

    report = DemoReport()
    with _step(report, "download"):
        folder = fetch_movielens_100k(settings().downloads_dir, images=images)
    with _step(report, "load"), connect() as connection:
        load_folder(connection, folder, images, progress=True)
    done = materialize(preset=preset, progress=True)
    report.seconds |= done["seconds"]
    report.generation = done["generation"]
    with _step(report, "evaluate"), connect() as connection:
        report.evaluation = evaluate_generation(connection, report.generation, progress=True)
    with _step(report, "retrieve"), connect() as connection:
        report.counts = _counts(connection)
        _recommend(connection, report)
    return report


@contextmanager
def _step(report: DemoReport, name: str) -> Iterator[None]:
    say(f"— {name}")
    start = time.perf_counter()
    yield
    report.seconds[name] = time.perf_counter() - start


def _counts(connection: Any) -> dict[str, int]:
    row = connection.execute(
        """select (select count(*) from interactions), (select count(*) from items),
                  (select count(distinct user_id) from interactions), (select count(*) from content_embeddings),
                  (select count(*) from item_embeddings join live_generation using (generation)),
                  (select count(*) from user_interests join live_generation using (generation))"""
    ).fetchone()
    names = ["interactions", "items", "users", "content_embeddings", "item_embeddings", "user_interests"]
    return dict(zip(names, map(int, row), strict=True))


def _recommend(connection: Any, report: DemoReport) -> None:
    """The first user, by id, whose history is of middling length: nobody picked for looking good."""
    from serving import queries
    from serving.question import Question

    (report.user,) = connection.execute(
        """select user_id from interactions group by user_id
           order by count(*) not between 40 and 80, user_id limit 1"""
    ).fetchone()
    newest = connection.execute(
        """select item_id from interactions where user_id = %s order by occurred_at desc, position desc limit %s""",
        [report.user, SHOWN_HISTORY],
    ).fetchall()
    found = queries.retrieve(connection, Question(user_id=report.user, k=SHOWN_CANDIDATES))
    described = {
        item_id: (title, genres)
        for item_id, title, genres in connection.execute(
            """select item_id, coalesce(title, item_id),
                      (select string_agg(genre, ', ') from jsonb_array_elements_text(
                          case jsonb_typeof(attributes -> 'genres') when 'array' then attributes -> 'genres'
                               else '[]' end) genre)
               from items where item_id = any(%s)""",
            [[item for (item,) in newest] + [candidate.item_id for candidate in found]],
        )
    }
    report.history = [described[item] for (item,) in newest]
    report.candidates = [(c.rank, *described[c.item_id], c.score, c.interest, c.interest_rank) for c in found]
    report.interests = connection.execute(INTERESTS, {"user": report.user, "k": SHOWN_PER_INTEREST}).fetchall()
