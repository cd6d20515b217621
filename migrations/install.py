"""Puts a function of sql/ into the database: what revisions call.

sql/NAME_vN.sql begins with the function's words, as SQL comments; their first paragraph becomes its comment in the
database and its entry on the page of the functions.
"""

from pathlib import Path

from alembic import op

SQL = Path(__file__).parent / "sql"
# What is said of each form of a function.
FORMS = """
select format('revoke all on function %%1$s from public; comment on function %%1$s is %%2$L',
              oid::regprocedure, %(words)s::text)
from pg_proc where proname = %(name)s and pronamespace = current_schema()::regnamespace
"""
# Loads pgvector's library: before that the hnsw settings which functions pin are unknown names, for superusers only.
LOADED = "select '[1]'::vector <#> '[1]'::vector"


def install(name: str, version: int) -> None:
    """Creates or replaces the function, in every form that the file has (for ids as text, and as integers).

    It is called by those alone to whom privileges.py grants it.
    """
    statement = text(name, version)
    _run(LOADED)
    _run(statement)
    forms = op.get_bind().exec_driver_sql(FORMS, {"name": name, "words": purpose(statement)}).scalars()
    for further in [*forms]:
        _run(further)


def text(name: str, version: int) -> str:
    """The file's text."""
    return (SQL / f"{name}_v{version}.sql").read_text()


def newest() -> dict[str, int]:
    """Every function of sql/, by name, with its newest version."""
    found = sorted(path.stem.rpartition("_v") for path in SQL.glob("*.sql"))
    return {name: max(int(version) for other, _, version in found if other == name) for name, _, _ in found}


def purpose(statement: str) -> str:
    """The first paragraph of the comment that the file begins with, on one line."""
    words = []
    for line in statement.splitlines():
        if not line.startswith("-- "):
            break
        words.append(line.removeprefix("-- "))
    return " ".join(words)


def _run(statement: str) -> None:
    # The driver takes % for a parameter.
    op.get_bind().exec_driver_sql(statement.replace("%", "%%"))
