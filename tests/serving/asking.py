"""Questions of a user in SQL, by their parts."""

from typing import Any

import psycopg

from serving import queries
from serving.queries import Candidate
from serving.question import Question


def retrieve(connection: psycopg.Connection[Any], user_id: str, **parts: Any) -> list[Candidate]:
    """serving.queries.retrieve of a question with these parts."""
    return queries.retrieve(connection, Question(user_id=user_id, **parts))
