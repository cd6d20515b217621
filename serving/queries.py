"""Statements that retrieval asks Postgres, with named parameters, and typed rows of what it answers.

Synchronous functions are here; answers with all that was asked for come from serving/answering.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from serving.question import Interests, Question

Row = Mapping[str, Any]
Column = NDArray[Any]
# Interests that found an item, its rank and its score in each.
Finders = tuple[Sequence[int], Sequence[int], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One retrieved item. score: inner product, higher is better; rank and interest_rank count from 1.

    interest: number of the interest that gave the score. found_by: all interests that found the item, with its rank
    and score in each of them. title: only where it was asked for.
    """

    item_id: str
    score: float
    rank: int
    interest: int
    interest_rank: int
    generation: int
    found_by: Sequence[int]
    found_ranks: Sequence[int]
    found_scores: Sequence[float]
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Who found N items, F rows in all, item after item: the interest, and the item's rank and score there.

    ends: [N], where each item's rows end.
    """

    interests: Column
    ranks: Column
    scores: Column
    ends: Column

    def spans(self) -> list[slice]:
        """Each item's rows."""
        ends = self.ends.tolist()
        return list(map(slice, [0, *ends[:-1]], ends))

    def by_item(self) -> list[Finders]:
        """(interests, ranks, scores) of each item."""
        interests, ranks, scores = self.interests.tolist(), self.ranks.tolist(), self.scores.tolist()
        return [(interests[span], ranks[span], scores[span]) for span in self.spans()]


@dataclass(frozen=True, slots=True)
class Candidates:
    """N retrieved items by column, best first; the columns are those of Candidate.

    A server writes answers of a hundred items from columns: that many objects cost it more than finding them does.
    found and titles: None where they were not asked for.
    """

    generation: int
    item_ids: list[str]
    scores: Column
    interests: Column
    interest_ranks: Column
    found: Found | None
    titles: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    def __iter__(self) -> Iterator[Candidate]:
        nobody: Finders = ((), (), ())
        found = [nobody] * len(self) if self.found is None else self.found.by_item()
        columns = zip(
            self.item_ids, self.scores.tolist(), self.interests.tolist(), self.interest_ranks.tolist(),
            found, self.titles or [None] * len(self), strict=True,
        )  # fmt: skip
        for rank, (item_id, score, interest, interest_rank, (by, ranks, scores), title) in enumerate(columns, 1):
            yield Candidate(item_id, score, rank, interest, interest_rank, self.generation, by, ranks, scores, title)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One item near another. score: inner product in the space asked for."""

    item_id: str
    score: float
    rank: int
    generation: int
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Interest:
    """One stored interest of a user. weight: its share, as learned; as_of: newest event it knows."""

    interest: int
    weight: float
    embedding: HalfVector
    as_of: datetime
    generation: int


CANDIDATES = """
select c.item_id, c.score, c.rank, c.interest, c.interest_rank, c.generation,
       c.found_by, c.found_ranks, c.found_scores
from polytower.retrieve(%(user_id)s, %(k)s, %(filter)s, %(exclude_seen)s, %(merge)s, %(exclude)s, %(allow)s,
                        %(diversity)s) c
order by c.rank limit %(k)s
"""

CANDIDATES_BY_VECTORS = """
select c.item_id, c.score, c.rank, c.interest, c.interest_rank, c.generation,
       c.found_by, c.found_ranks, c.found_scores
from polytower.retrieve_vectors(%(interests)b::halfvec[], %(weights)s::real[], %(k)s, %(filter)s, %(exclude)s,
                                %(merge)s, %(space)s, %(generation)s, allow => %(allow)s,
                                diversity => %(diversity)s, exact => %(exact)s) c
order by c.rank limit %(k)s
"""

CANDIDATES_MIXED = """
select c.item_id, c.score, c.rank, c.interest, c.interest_rank, c.generation,
       c.found_by, c.found_ranks, c.found_scores
from polytower.retrieve_mixed(%(interests)b::halfvec[], %(content)s, %(mix)s::real, %(space)s, %(k)s, %(filter)s,
                              %(exclude)s, %(generation)s, allow => %(allow)s) c
order by c.rank limit %(k)s
"""

NEIGHBOURS = """
select n.item_id, n.score, n.rank, n.generation
from polytower.similar_items(%(item_id)s, %(k)s, %(space)s, %(filter)s) n
order by n.rank limit %(k)s
"""

INTERESTS = """
select i.interest, i.weight, i.embedding, i.as_of, i.generation
from polytower.user_interests(%(user_id)s) i
order by i.interest limit 64
"""

TITLES = "select item_id, title from items where item_id = any (%(item_ids)s) limit 1000"


def parameters_of(question: Question) -> dict[str, Any]:
    """Parameters of CANDIDATES."""
    return {
        "user_id": question.user_id,
        "k": question.k,
        "filter": Jsonb(question.filter),
        "exclude_seen": question.exclude_seen,
        "exclude": question.exclude,
        "merge": question.merge,
        "allow": question.allow,
        "diversity": None if question.diversity is None else Jsonb(question.diversity.model_dump()),
    }


def search_parameters(
    question: Question, interests: Interests, generation: int | None, *, exact: bool = False
) -> dict[str, Any]:
    """Parameters of CANDIDATES_BY_VECTORS and CANDIDATES_MIXED. generation: None for the live one; exact: by a scan."""
    return parameters_of(question) | {
        "exclude": [*question.exclude, *interests.banned],
        "interests": [HalfVector(vector) for vector in interests.vectors],
        "weights": None if interests.weights is None else list(interests.weights),
        "space": question.searched_space,
        "generation": generation,
        "exact": exact,
        "content": None if interests.content is None else HalfVector(interests.content),
        "mix": question.share,
    }


def retrieve(connection: psycopg.Connection[Any], question: Question) -> list[Candidate]:
    """Candidates for the question's user from the interests stored with the live generation, best first.

    Raises psycopg.Error with a SQLSTATE of serving.errors.PROBLEMS; errors.user_error() words it for a person.
    """
    with connection.cursor(binary=True, row_factory=class_row(Candidate)) as cursor:
        found = cursor.execute(CANDIDATES, parameters_of(question)).fetchall()
    if "title" not in question.fields:
        return found
    known = _titles(connection, [candidate.item_id for candidate in found])
    return [replace(candidate, title=known.get(candidate.item_id)) for candidate in found]


def similar(
    connection: psycopg.Connection[Any],
    item_id: str,
    *,
    k: int = 10,
    space: str = "item",
    filter: Mapping[str, Any] | None = None,  # noqa: A002 the name of the SQL argument
    titles: bool = False,
) -> list[Neighbour]:
    """Items most like one item in one of the spaces, best first. Raises as retrieve() does."""
    parameters = {"item_id": item_id, "k": k, "space": space, "filter": Jsonb(dict(filter or {}))}
    with connection.cursor(row_factory=class_row(Neighbour)) as cursor:
        found = cursor.execute(NEIGHBOURS, parameters).fetchall()
    if not titles:
        return found
    known = _titles(connection, [neighbour.item_id for neighbour in found])
    return [replace(neighbour, title=known.get(neighbour.item_id)) for neighbour in found]


def _titles(connection: psycopg.Connection[Any], item_ids: Sequence[str]) -> dict[str, str | None]:
    return dict(connection.execute(TITLES, {"item_ids": list(item_ids)}).fetchall())


class State(NamedTuple):
    """What a question starts from: the live generation, and what tells a server whether its index is of this state.

    The rest is a user's: stored interests (vectors of 16-bit values, high byte first, interest after interest); what
    was seen; and whether the interests are stale, since there are none, or events arrived that they do not know,
    however dated. Then come the newest part of the history that the generation knows, oldest first, with its times;
    items of the newest events that it does not know; what is known of the user; and, for towers that read queries, the
    key of what was searched for at each event of that history (None for nothing).
    """

    generation: int
    dim: int
    version: int
    vectors: bytes | None = None
    weights: list[float] | None = None
    numbers: list[int] | None = None
    seen: list[str] | None = None
    stale: bool = True
    history: list[str] | None = None
    microseconds: list[int] | None = None
    unknown: list[str] | None = None
    attributes: dict[str, Any] | None = None
    query_keys: list[str | None] | None = None


# No row: no generation is live.
STATE = """
select g.generation, g.dim, v.version
from generations g cross join item_version v where g.state = 'live' limit 1
"""

# The same with all that a user's question needs, in one round trip. length: events of a history at most. searches:
# the interests are to be computed now, whether or not events arrived.
USER_STATE = """
select g.generation, g.dim, v.version, u.vectors, u.weights, u.numbers, h.seen, s.stale,
       n.history, n.microseconds, m.unknown, a.attributes, n.query_keys
from generations g
cross join item_version v
cross join lateral (
    select string_agg(substr(halfvec_send(i.embedding), 5), '' order by i.interest) as vectors,
           array_agg(i.weight order by i.interest) as weights, array_agg(i.interest order by i.interest) as numbers,
           max(i.as_of) as as_of, max(i.events) as events
    from user_interests i where i.generation = g.generation and i.user_id = %(user_id)s
) u
cross join lateral (
    select count(*) as events, max(i.occurred_at) as newest_at,
           array_agg(i.item_id) filter (where %(exclude_seen)s) as seen
    from interactions i where i.user_id = %(user_id)s
) h
cross join lateral (
    -- by count, so that neither a clock nor the order of commits hides an event; generations before 0054 have none
    select coalesce(case when u.events is null then h.newest_at > u.as_of or u.as_of is null
                         else h.events <> u.events end, false) or %(searches)s as stale
) s
cross join lateral (
    select array_agg(e.item_id order by e.occurred_at, e.position) as history,
           array_agg((extract(epoch from e.occurred_at) * 1000000)::bigint order by e.occurred_at, e.position)
               as microseconds,
           case when bool_or(r.reads) then array_agg(query_key(e.query) order by e.occurred_at, e.position) end
               as query_keys
    from (
        select i.item_id, i.occurred_at, i.position, i.query
        from interactions i join item_embeddings e on e.generation = g.generation and e.item_id = i.item_id
        where i.user_id = %(user_id)s and s.stale
        order by i.occurred_at desc, i.position desc limit %(length)s
    ) e
    cross join lateral (
        select exists (select from towers t where t.generation = g.generation and t.part = 'user_tower'
                       and coalesce(t.config ->> 'pair', 'none') <> 'none') as reads
    ) r
) n
cross join lateral (
    select array_agg(distinct e.item_id) as unknown
    from (
        select i.item_id from interactions i where i.user_id = %(user_id)s and s.stale
        order by i.occurred_at desc, i.position desc limit %(length)s
    ) e
    where not exists (select from item_embeddings x where x.generation = g.generation and x.item_id = e.item_id)
) m
left join lateral (select p.attributes from users p where p.user_id = %(user_id)s and s.stale limit 1) a on true
where g.state = 'live' limit 1
"""

UNKNOWN_USER = "select polytower.raise_unknown_user(%(user_id)s, %(generation)s) limit 1"

ITEM_VECTORS = """
select item_id, embedding from item_embeddings
where generation = %(generation)s and item_id = any (%(item_ids)s) limit 10000
"""

# What items are made of, by the encoders that the generation was built from: for user towers that read it.
ITEM_CONTENT = """
select c.item_id, c.modality, c.embedding
from generations g
cross join lateral jsonb_each_text(g.config -> 'encoders') as e (modality, revision)
join content_embeddings c
    on c.item_id = any (%(item_ids)s) and c.modality = e.modality and c.revision = e.revision
where g.generation = %(generation)s limit 100000
"""

# By the text encoder that the generation was built from.
QUERY_VECTORS = """
select q.query_key, q.embedding from query_embeddings q
join generations g on g.generation = %(generation)s and q.revision = g.config -> 'encoders' ->> 'text'
where q.query_key = any (%(keys)s) limit 1000
"""

USER_TOWER = """
select weights, config from towers where generation = %(generation)s and part = 'user_tower' limit 1
"""

# A row if the generation's user tower reads users' attributes.
READS_ATTRIBUTES = """
select 1 from towers
where generation = %(generation)s and part = 'user_tower' and coalesce((config -> 'user_attributes')::int, 0) > 0
"""

# What a text or picture has to go through: the encoders that the live generation was built from, with their names, and
# whether its user tower reads what users search for.
LIVE_ENCODERS = """
select g.generation, coalesce(g.config -> 'encoders', '{}') as encoders,
       (select coalesce(jsonb_object_agg(e.modality, e.model), '{}') from content_encoders e
        where g.config -> 'encoders' ->> e.modality = e.revision) as models,
       exists (select from towers t where t.generation = g.generation and t.part = 'user_tower'
               and coalesce(t.config ->> 'pair', 'none') <> 'none') as reads_queries
from generations g where g.state = 'live' limit 1
"""

CONTENT_TOWER = """
select weights, config from towers where generation = %(generation)s and part = 'content' limit 1
"""

# The adapter that training put into a modality's encoder; no row where that encoder stayed as it was.
ADAPTER = """
select weights from towers where generation = %(generation)s and part = 'adapter_' || %(modality)s limit 1
"""

GENERATIONS = """
select generation, state, dim, interests, created_at, live_at, metrics from generations
order by generation desc limit 1000
"""

READY = "select generation from generations where state = 'live' limit 1"
