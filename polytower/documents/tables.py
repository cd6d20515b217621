"""docs/reference/tables.md: every table with its purpose, key and columns."""

from sqlalchemy import Dialect, Table, make_url

from migrations.tables import metadata

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


def page() -> str:
    """The page, from `migrations/tables.py`."""
    return "# Tables\n\nSchema `polytower`.\n" + "".join(
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
