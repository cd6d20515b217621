"""Brings a database of before the squash to its last revision.

Can go with 1.0, and tests/migrations/test_bridge.py and old_*.sql.gz with it.

The revisions were 0001 to 0059 once, with every version of every function; three that make today's objects at once have
replaced them. From the heads that a main had, the few statements here and today's functions make the same database.
"""

from importlib import import_module

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

from migrations.install import install

OLD_HEADS = ("0041", "0053", "0054", "0056", "0059")
# What 0053 and 0054 did besides functions.
STATEMENTS = """
drop function if exists ensure_interactions_year(integer);
alter table user_interests add column if not exists events bigint;
update alembic_version set version_num = '0062';
"""


def cross(context: MigrationContext) -> None:
    """Does nothing but to a database at one of the old heads."""
    if context.get_current_revision() not in OLD_HEADS:
        return
    with Operations.context(context) as op:
        op.execute(STATEMENTS)
        for name, version in import_module("migrations.versions.0061_functions").FUNCTIONS.items():
            install(name, version)
