"""Spaces of content encoders beside those of a generation, questions that mix a user with a text, sums of vectors.

Compatibility: the public functions keep their arguments; a space that was refused before is answered now.
"""

from alembic import op

from migrations.install import install

revision = "0085"
down_revision = "0076"
branch_labels = None
depends_on = None

TYPE = """
create type space_source as (relation text, condition text, space_column text, dim int, walkable boolean);
"""
NEW = ("searched_space", "summed", "retrieve_mixed")
# Other arguments than before: the old ones would stay beside the new.
CHANGED = ("check_question", "check_vectors", "walk_statement", "walked_lists", "walked_in_turn", "scanned_lists")
SAME = ("nearest", "similar_items")


def upgrade() -> None:
    op.execute(TYPE)
    install("searched_space", 1)
    install("summed", 1)
    _replace(2)
    install("retrieve_vectors", 3)
    install("retrieve_mixed", 1)


def downgrade() -> None:
    for name in NEW:
        op.execute(f"drop function {name}")
    _replace(1)
    install("retrieve_vectors", 2)
    op.execute("drop type space_source")


def _replace(version: int) -> None:
    for name in CHANGED:
        op.execute(f"drop function {name}")
    for name in (*CHANGED, *SAME):
        install(name, version)
    install("retrieve_vectors", version + 1)  # 0071 brought a second one before
