"""Pages written from the code: docs/schema.md and README's map of the files. A test holds them current.

`python -m polytower.commands.document` writes them.
"""

import ast
import re
from pathlib import Path

from sqlalchemy import Dialect, Table, make_url

from migrations.tables import metadata

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SCHEMA_PAGE = ROOT / "docs" / "schema.md"
FOLDERS = ("feature_repo", "encoders", "pipelines", "migrations", "serving", "polytower")
MAP = re.compile(r"(?<=<!-- map -->\n).*(?=<!-- end of map -->)", re.DOTALL)

DIALECT: type[Dialect] = make_url("postgresql+psycopg://").get_dialect()

PURPOSE = {
    "items": "What can be recommended. `attributes` holds every further column of the source.",
    "users": "Attributes of users, where the source brings any.",
    "interactions": "One event a row, partitioned by year. A user's order is (occurred_at, position).",
    "changed_days": "Journal of days whose interactions changed since sequences and statistics were refreshed.",
    "user_sequences": "A user's newest events at the end of each active day; the newest row is the online feature.",
    "user_stats": "A user's running totals at the end of each active day.",
    "item_stats": "An item's running totals at the end of each active day.",
    "content_encoders": "Encoder revisions; at most one per modality is active.",
    "content_embeddings": "What an item is: one unit vector per item, modality and encoder revision.",
    "codebooks": "Product-quantisation centroids of one encoder revision.",
    "content_codes": "Content embeddings as codes of a codebook.",
    "generations": "Immutable bundles of embeddings and towers: building, ready, live, retired or failed.",
    "promotions": "When each generation was live; intervals never overlap.",
    "towers": "Exported towers (safetensors) that belong to a generation.",
    "item_embeddings": "Item, content and ID embedding of every item, partitioned by generation.",
    "user_interests": "K interests of every user with their weights, partitioned by generation.",
    "loads": "Every load: its source, its counts, how it ended.",
    "rejected_rows": "Rows that a load put aside, with file, row number, column and reason.",
    "item_version": "One row, counted up by every change of items: tells an index in memory that it is old.",
    "api_keys": "Who may ask the HTTP API: hashes of keys, never a key. Analysts cannot read it.",
}


def schema_page() -> str:
    """docs/schema.md: every table with its purpose, key and columns."""
    head = "# Tables\n\nSchema `polytower`. Written by `python -m polytower.commands.document` from `migrations/tables.py`.\n"  # noqa: E501
    return head + "".join(
        _section(table) for table in sorted(metadata.tables.values(), key=lambda t: list(PURPOSE).index(t.name))
    )


def _section(table: Table) -> str:
    key = ", ".join(column.name for column in table.primary_key.columns)
    lines = [f"\n## {table.name}\n{PURPOSE[table.name]}", f"Key: {key}.\n" if key else "No key.\n"]
    lines += ["| column | type | null |", "|---|---|---|"]
    for column in table.columns:
        kind = column.type.compile(dialect=DIALECT()).lower()
        lines.append(f"| {column.name} | {kind} | {'yes' if column.nullable else 'no'} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """README.md with its map of the files brought up to date."""
    return MAP.sub(lambda _: "\n".join(map(_folder, FOLDERS)) + "\n", README.read_text())


def _folder(folder: str) -> str:
    """A folder's purpose, then its files: the first sentence of each module's docstring."""
    lines = [f"**{folder}/** {_purpose(ROOT / folder / '__init__.py')}\n"]
    files = sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
    return "\n".join([*lines, *(f"- `{path.name}` {_purpose(path)}" for path in files)]) + "\n"


def _purpose(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`\"]\.)\s", paragraph)[0]


if __name__ == "__main__":
    SCHEMA_PAGE.write_text(schema_page())
    README.write_text(readme())
