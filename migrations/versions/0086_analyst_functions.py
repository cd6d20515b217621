"""What analysts ask: why, find, interest_overlap, generation_diff; ids that are integers may be written as such.

Compatibility: functions are added; of those that were there, what is called with text is unchanged.
"""

from alembic import op

from migrations.install import install

revision = "0086"
down_revision = "0085"
branch_labels = None
depends_on = None

NEW = ("why", "find", "interest_overlap", "nearest_of", "generation_diff")
# With a second form for ids that are integers: its arguments.
FORMS = {
    "retrieve": "bigint, int, jsonb, bool, text, text[], text[], jsonb",
    "similar_items": "bigint, int, text, jsonb",
    "user_interests": "bigint",
    "seen_items": "bigint",
}
VERSIONS = {"retrieve": 2, "similar_items": 3, "user_interests": 2, "seen_items": 2}


def upgrade() -> None:
    for name, version in VERSIONS.items():
        install(name, version)
    for name in NEW:
        install(name, 1)


def downgrade() -> None:
    op.execute("drop function why(text, text, int), why(bigint, bigint, int), find, nearest_of, generation_diff")
    op.execute("drop function interest_overlap(text, text), interest_overlap(bigint, bigint)")
    for name, arguments in FORMS.items():
        op.execute(f"drop function {name}({arguments})")
        install(name, VERSIONS[name] - 1)
