"""Why an answer is empty: one question to Postgres, which is asked only then."""

from typing import Any

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from serving.database import Session
from serving.question import Interests, Question

_COUNTS = """
select exists (select from items i where i.available and i.attributes @@ polytower.filter_path(%(filter)s)) as matching,
       (select count(*) from unnest(%(allow)s::text[]) a (item_id)
        join item_embeddings e on e.generation = %(generation)s and e.item_id = a.item_id
        left join items i on i.item_id = a.item_id where i.available is not false) as allowed
limit 1
"""


async def why_nothing(connection: Session, question: Question, interests: Interests, generation: int) -> str:
    """The first condition that leaves no item, with the way out."""
    found: dict[str, Any] = {}
    if question.filter or question.allow is not None:
        async with connection.cursor(row_factory=dict_row) as cursor:
            asked = {"filter": Jsonb(question.filter), "allow": question.allow, "generation": generation}
            found = (await (await cursor.execute(_COUNTS, asked)).fetchone()) or {}
    if question.filter and not found["matching"]:
        return "nothing was found: no available item matches the filter"
    if question.allow is not None and not found["allowed"]:
        return (
            f"nothing was found: of the {len(question.allow)} items in allow, generation {generation} has none that is"
            " available"
        )
    conditions = ["the filter"] * bool(question.filter) + ["allow"] * (question.allow is not None)
    passing = f" that pass {' and '.join(conditions)}" if conditions else ""
    gone = ["excluded"] * bool(question.exclude) + ["seen before (exclude_seen)"] * bool(interests.banned)
    if gone:
        return f"nothing was found: all items{passing} were {' or '.join(gone)}"
    together = f", or none passes {' and '.join(conditions)}" if conditions else ""
    return f"nothing was found: no available item has a vector in the space {question.searched_space}{together}"
