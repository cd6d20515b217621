"""Retrieval walks the interests in turn; merges tell all who found an item; allow-lists, diversity, a version of items.

Compatibility: calls with 0002's arguments of retrieve, retrieve_vectors, nearest and similar_items go on working;
candidates have three columns more, at the end. Writers of items wait for each other from here on.
"""

from pathlib import Path

from alembic import op

revision = "0010"
down_revision = "0003"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"

# What 0002 made and this revision replaces or no longer needs: name → arguments.
BEFORE = {
    "served_generation": "bigint",
    "check_question": "int, text, text",
    "first_depth": "int, int, text",
    "filter_members": "jsonpath, jsonb, int",
    "walked_lists": "bigint, int, text, halfvec[], int, jsonpath, text[]",
    "deeper_lists": "int[], text[], real[], int, int",
    "walked_to_depth": "bigint, int, text, halfvec[], int, int, jsonpath, text[]",
    "scanned_lists": "bigint, int, text, halfvec[], int, jsonpath, text[], text[]",
    "merge_lists": "int[], text[], real[], real[], int, text",
    "retrieve_vectors": "halfvec[], real[], int, jsonb, text[], text, text, bigint",
    "retrieve": "text, int, jsonb, bool, text, text[]",
}
# In the order in which each finds what it calls: name → version, arguments.
AFTER = {
    "served_generation": (2, "bigint"),
    "check_question": (2, "int, text, text, jsonb"),
    "raise_unknown_attribute": (1, "jsonb"),
    "filter_members": (2, "jsonpath, jsonb, text[], int"),
    "walk_statement": (1, "bigint, int, text, jsonpath, text[]"),
    "walked_lists": (2, "bigint, int, text, halfvec[], int, jsonpath, text[]"),
    "walked_in_turn": (1, "bigint, int, text, halfvec[], int, int, jsonpath, text[]"),
    "scanned_lists": (2, "bigint, int, text, halfvec[], int, jsonpath, text[], text[]"),
    "best_of_lists": (1, "int[], text[], real[]"),
    "diverse_picks": (1, "text[], real[], int, jsonb"),
    "merge_lists": (2, "int[], text[], real[], real[], int, text, jsonb"),
    "retrieve_vectors": (2, "halfvec[], real[], int, jsonb, text[], text, text, bigint, text[], jsonb, bool, int"),
    "retrieve": (2, "text, int, jsonb, bool, text, text[], text[], jsonb"),
}

# A server's index in memory knows attributes and availability as they were when it was filled; this one row tells it
# that they changed. The trigger takes the row before any row of items, so that two writers never wait in a circle.
VERSION = """
create table item_version (only_row boolean primary key default true check (only_row), version bigint not null);
insert into item_version (version) values (0);
grant select on item_version to polytower_reader;
create function count_item_version() returns trigger language plpgsql security definer
set search_path = polytower, public as $$
begin
    -- Once per transaction: 200,000 single inserts would else leave as many versions of the row to be walked through.
    if current_setting('polytower.items_changed_by', true) is distinct from pg_current_xact_id()::text then
        update item_version set version = version + 1;
        perform set_config('polytower.items_changed_by', pg_current_xact_id()::text, true);
    end if;
    return null;
end $$;
create trigger items_version before insert or update or delete or truncate on items
    for each statement execute function count_item_version();
"""

NO_VERSION = """
drop trigger items_version on items;
drop function count_item_version;
drop table item_version;
"""


def upgrade() -> None:
    # Loads pgvector's library: the hnsw settings that functions pin are unknown names before.
    op.execute("select '[1]'::vector <#> '[1]'::vector")
    for name, arguments in reversed(BEFORE.items()):
        op.execute(f"drop function {name}({arguments})")
    op.execute(
        "alter type candidate add attribute found_by smallint[], add attribute found_ranks int[],"
        " add attribute found_scores real[]"
    )
    for name, (version, arguments) in AFTER.items():
        _create(name, version, arguments)
    op.execute(VERSION)


def downgrade() -> None:
    op.execute("select '[1]'::vector <#> '[1]'::vector")
    op.execute(NO_VERSION)
    for name, (_, arguments) in reversed(AFTER.items()):
        op.execute(f"drop function {name}({arguments})")
    op.execute("alter type candidate drop attribute found_by, drop attribute found_ranks, drop attribute found_scores")
    for name, arguments in BEFORE.items():
        _create(name, 1, arguments)


def _create(name: str, version: int, arguments: str) -> None:
    op.get_bind().exec_driver_sql((SQL / f"{name}_v{version}.sql").read_text().replace("%", "%%"))
    op.execute(f"revoke all on function {name}({arguments}) from public")
    op.execute(f"grant execute on function {name}({arguments}) to polytower_reader")
