"""The functions of sql/, their types and triggers.

Compatibility: the tables are of no use without them; code that is older than these three revisions is bridged.
"""

from alembic import op

from migrations.install import install

revision = "0061"
down_revision = "0060"
branch_labels = None
depends_on = None

# What retrieval answers with. Types rather than output columns: an argument may then bear the name of a column.
TYPES = """
create type candidate as (
    item_id text, score real, rank int, interest smallint, interest_rank int, generation bigint,
    found_by smallint[], found_ranks int[], found_scores real[]);
create type neighbour as (item_id text, score real, rank int, generation bigint);
"""

# Name and version, in the order in which each finds what it calls.
FUNCTIONS = {
    "record_changed_days": 1,
    "interaction_event_id": 1,
    "ensure_interactions_year": 1,
    "count_item_version": 1,
    "filter_path": 1,
    "served_generation": 1,
    "check_question": 1,
    "check_vectors": 1,
    "raise_unknown_attribute": 1,
    "filter_members": 1,
    "ranked_lists": 1,
    "interest_quotas": 1,
    "walk_statement": 1,
    "walked_lists": 1,
    "walked_in_turn": 1,
    "scanned_lists": 1,
    "best_of_lists": 1,
    "diverse_picks": 1,
    "merge_lists": 1,
    "retrieve_vectors": 1,
    "raise_unknown_user": 1,
    "seen_items": 1,
    "retrieve": 1,
    "user_interests": 1,
    "nearest": 1,
    "similar_items": 1,
}

TRIGGERS = """
create trigger interactions_inserted after insert on interactions
    referencing new table as changed_rows for each statement execute function record_changed_days();
create trigger interactions_deleted after delete on interactions
    referencing old table as changed_rows for each statement execute function record_changed_days();
create trigger items_version before insert or update or delete or truncate on items
    for each statement execute function count_item_version();
"""

NO_TRIGGERS = """
drop trigger items_version on items;
drop trigger interactions_deleted on interactions;
drop trigger interactions_inserted on interactions;
"""


def upgrade() -> None:
    op.execute(TYPES)
    for name, version in FUNCTIONS.items():
        install(name, version)
    op.execute(TRIGGERS)


def downgrade() -> None:
    op.execute(NO_TRIGGERS)
    for name in reversed(FUNCTIONS):
        op.execute(f"drop function {name}")
    op.execute("drop type candidate, neighbour")
