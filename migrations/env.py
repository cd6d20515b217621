"""Runs the migrations: one process at a time per database, with budgets, in the platform's schema, all or nothing."""

from alembic import context
from sqlalchemy import NullPool, create_engine, text

from migrations import bridge, comments, content_views, head, privileges
from migrations.env_names import include_name
from migrations.tables import metadata
from polytower.locks import MIGRATE, held
from polytower.postgres import database_url
from polytower.url import sqlalchemy_url

# A migration never waits long behind a running query, nor makes others wait long behind itself.
BUDGETS = "set lock_timeout = '10s'; set statement_timeout = '10min'"


def run() -> None:
    """Upgrades or downgrades over one connection."""
    url = sqlalchemy_url(context.config.attributes.get("url") or database_url())
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(BUDGETS))
        connection.commit()
        # Two processes that start at once migrate one after the other.
        driver = connection.connection.driver_connection
        assert driver is not None
        with held(driver, MIGRATE):
            privileges.prepare(connection)
            context.configure(
                connection=connection,
                target_metadata=metadata,
                include_name=include_name,
            )
            with context.begin_transaction():
                bridge.cross(context.get_context())
                context.run_migrations()
                if context.get_context().get_current_revision() == head():
                    content_views.refresh(connection)
                    privileges.grant(connection)
                    comments.write(connection)


run()
