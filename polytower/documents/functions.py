"""docs/reference/functions.md: every SQL function with its arguments and its words, from migrations/sql/."""

import re

from migrations.install import newest, purpose, text
from polytower.documents.markdown import bullets, paragraph

# What analysts call; everything else is what these, the loads and the triggers are made of.
PUBLIC = (
    "retrieve",
    "similar_items",
    "nearest",
    "find",
    "why",
    "user_interests",
    "interest_overlap",
    "seen_items",
    "generation_diff",
    "retrieve_vectors",
    "retrieve_mixed",
)

HEAD = """# SQL functions

Schema `polytower`. [The guide](../sql.md) shows how to ask; in psql, `\\df+ polytower.retrieve` shows the same words.
Ids are text; where they are integers, `retrieve(196)` means `retrieve('196')`.
"""

PARTS = """
## What these are made of

They are not promised to stay as they are.
"""


def page() -> str:
    """The page, from the newest version of every function."""
    versions = newest()
    statements = {name: text(name, version) for name, version in versions.items()}
    parts = bullets(
        (f"`{_signature(statement)}`", purpose(statement))
        for name, statement in statements.items()
        if name not in PUBLIC
    )
    return HEAD + "".join(_section(name, statements[name]) for name in PUBLIC) + f"{PARTS}\n{parts}\n"


def _section(name: str, statement: str) -> str:
    return f"\n## {name}\n\n```sql\n{_declared(statement)}\n```\n\n{paragraph(purpose(statement))}\n"


def _declared(statement: str) -> str:
    """Name, arguments and result as the file has them."""
    found = re.search(r"create or replace function (.*?)\s+(?:immutable\s+)?language ", statement, re.DOTALL)
    assert found is not None
    return found[1]


def _signature(statement: str) -> str:
    """The name with the names of its arguments."""
    name, arguments = re.match(r"(\w+)\((.*?)\)(?:\s+returns|$)", _declared(statement), re.DOTALL).groups()  # type: ignore[union-attr]
    given = [part.split() for part in arguments.split(",") if part.strip()]
    return f"{name}({', '.join(words[1 if words[0] == 'variadic' else 0] for words in given if words[0] != 'out')})"
