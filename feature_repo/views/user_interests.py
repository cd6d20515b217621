"""The interests that the user tower found in a user's events."""

from psycopg import sql

from feature_repo.schema import RANKER_SERVICE, RETRIEVAL_SERVICE, USER
from feature_repo.views.view import Feature, Rows, View

_ROW = sql.SQL("""
        select generation,
               array(select unnest(array_agg(embedding::real[] order by interest))) as vectors,
               array_agg(weight order by interest) as weights,
               count(*) as interest_count,
               max(public.vector_dims(embedding))::bigint as interest_dim
        from ({generation}) as past
        join polytower.user_interests using (generation)
        where user_id = wanted.user_id
        group by generation
        """)
_LIVE = sql.SQL("""
        select generation from polytower.promotions
        where live_from <= wanted.moment and (live_until is null or wanted.moment < live_until)
        """)
_TRAINED = sql.SQL("select polytower.trained_generation(wanted.moment) as generation")

VIEW = View(
    name="user_interests",
    entity=USER,
    description="The K interests of a user in the generation that was live",
    services=(RETRIEVAL_SERVICE, RANKER_SERVICE),
    rows=Rows(
        # bodies: what halfvec_send has of each interest behind its header of four bytes.
        now="""
        select generation,
               string_agg(substring(halfvec_send(embedding) from 5), ''::bytea order by interest) as bodies,
               array_agg(weight order by interest) as weights,
               count(*) as interest_count,
               max(vector_dims(embedding))::bigint as interest_dim,
               (select live_from from polytower.promotions where live_until is null) as as_of
        from polytower.user_interests
        where user_id = wanted.user_id and generation = (select generation from polytower.live_generation)
        group by generation
        """,
        before=_ROW.format(generation=_LIVE).as_string(),
        # As they were when that generation was trained: computed from the events before then.
        backfilled=_ROW.format(generation=_TRAINED).as_string(),
    ),
    features=(
        Feature(
            "interests",
            "halves",
            "vectors",
            "K x D unit vectors, flattened row by row",
            # The header is put back as four bytes that nobody reads.
            sent="'\\x00000000'::bytea || bodies",
        ),
        Feature("interest_weights", "reals", "weights", "K shares that sum to 1"),
        Feature("interest_count", "integer", description="K"),
        Feature("interest_dim", "integer", description="D"),
        Feature("interests_generation", "integer", "generation"),
    ),
)
