"""The view `item_content` has one column per modality: made of the records, for every way to read it."""

from typing import LiteralString

from psycopg import sql

from feature_repo.columns import Kind
from feature_repo.modalities import MODALITIES

_EMBEDDING = sql.SQL("(array_agg(embedding) filter (where modality = {name}))[1]{cast} as {feature}")


def with_embeddings(statement: LiteralString, cast: LiteralString = "") -> LiteralString:
    """The statement over content_embeddings with each modality's embedding, by its feature's name, for {embeddings}."""
    columns = [
        _EMBEDDING.format(name=sql.Literal(one.name), cast=sql.SQL(cast), feature=sql.Identifier(one.feature))
        for one in MODALITIES.values()
    ]
    return sql.SQL(statement).format(embeddings=sql.SQL(", ").join(columns)).as_string()


def sent_embeddings() -> dict[str, tuple[LiteralString, Kind]]:
    """Feature → (SQL that sends it, its kind)."""
    return {
        one.feature: (sql.SQL("halfvec_send({})").format(sql.Identifier(one.feature)).as_string(), "halves")
        for one in MODALITIES.values()
    }
