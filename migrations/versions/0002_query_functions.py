"""The query layer's functions, one .sql file each.

Compatibility: adds functions and one index; code that runs against 0001 sees no difference. A later change of a
function is a new file (NAME_v2.sql) run by a new revision, whose downgrade runs this one again.
"""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"

# In the order in which each finds what it calls.
FUNCTIONS = {
    "filter_path": "jsonb",
    "served_generation": "bigint",
    "check_question": "int, text, text",
    "check_vectors": "halfvec[], real[], int",
    "first_depth": "int, int, text",
    "ranked_lists": "int[], text[], real[]",
    "interest_quotas": "real[], int",
    "filter_members": "jsonpath, jsonb, int",
    "walked_lists": "bigint, int, text, halfvec[], int, jsonpath, text[]",
    "deeper_lists": "int[], text[], real[], int, int",
    "walked_to_depth": "bigint, int, text, halfvec[], int, int, jsonpath, text[]",
    "scanned_lists": "bigint, int, text, halfvec[], int, jsonpath, text[], text[]",
    "merge_lists": "int[], text[], real[], real[], int, text",
    "retrieve_vectors": "halfvec[], real[], int, jsonb, text[], text, text, bigint",
    "raise_unknown_user": "text, bigint",
    "seen_items": "text",
    "retrieve": "text, int, jsonb, bool, text, text[]",
    "user_interests": "text",
    "nearest": "halfvec, int, text, jsonb",
    "similar_items": "text, int, text, jsonb",
}


def upgrade() -> None:
    # Loads pgvector's library: the hnsw settings that functions pin are unknown names before.
    op.execute("select '[1]'::vector <#> '[1]'::vector")
    # Available is the rule: retrieval asks for the exceptions.
    op.execute("create index items_unavailable_idx on items (item_id) where not available")
    op.execute((SQL / "types_v1.sql").read_text())
    for name, arguments in FUNCTIONS.items():
        op.get_bind().exec_driver_sql((SQL / f"{name}_v1.sql").read_text().replace("%", "%%"))
        op.execute(f"revoke all on function {name}({arguments}) from public")
        op.execute(f"grant execute on function {name}({arguments}) to polytower_reader")


def downgrade() -> None:
    for name, arguments in reversed(FUNCTIONS.items()):
        op.execute(f"drop function {name}({arguments})")
    op.execute("drop type candidate, neighbour")
    op.execute("drop index items_unavailable_idx")
