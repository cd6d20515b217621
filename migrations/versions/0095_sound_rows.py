"""Rows of a generation are sound and stay as they are: unit vectors, weights that are shares, no write afterwards.

Compatibility: what older code writes passes. Whoever means to change a generation that is ready says so with
`set local polytower.amends_generation = 'on'`.
"""

from alembic import op

from migrations.install import LOADED, install

revision = "0095"
down_revision = "0086"
branch_labels = None
depends_on = None

# Halves are rounded by less than .001 of the length.
CONSTRAINTS = """
alter table item_embeddings
    add constraint item_embeddings_unit_check check (
        l2_norm(embedding) between 0.99 and 1.01 and l2_norm(content_embedding) between 0.99 and 1.01
        and l2_norm(id_embedding) between 0.99 and 1.01);
alter table user_interests
    add constraint user_interests_unit_check check (l2_norm(embedding) between 0.99 and 1.01),
    add constraint user_interests_weight_check check (weight >= 0 and weight <= 1.001::real);
"""
TRIGGERS = """
create trigger item_embeddings_sealed before insert or update or delete on item_embeddings
    for each row execute function refuse_amendment();
create trigger user_interests_sealed before insert or update or delete on user_interests
    for each row execute function refuse_amendment();
create trigger towers_sealed before update or delete on towers
    for each row execute function refuse_amendment();
"""
# Partitions made by older code.
KEPT_WHOLE = """
do $$
declare
    part record;
begin
    for part in select inhrelid::regclass as name, inhparent::regclass::text as parent from pg_inherits
        where inhparent in ('item_embeddings'::regclass, 'user_interests'::regclass)
    loop
        execute format('create trigger %I before truncate on %s for each statement'
                       ' execute function refuse_truncation()', part.parent || '_kept_whole', part.name);
    end loop;
end $$;
"""
DROPS = """
drop trigger towers_sealed on towers;
drop trigger user_interests_sealed on user_interests;
drop trigger item_embeddings_sealed on item_embeddings;
drop function refuse_amendment cascade;
drop function refuse_truncation cascade;
alter table user_interests drop constraint user_interests_unit_check, drop constraint user_interests_weight_check;
alter table item_embeddings drop constraint item_embeddings_unit_check;
"""


def upgrade() -> None:
    op.execute(LOADED)
    op.execute(CONSTRAINTS)
    install("refuse_amendment", 1)
    install("refuse_truncation", 1)
    op.execute(TRIGGERS)
    op.execute(KEPT_WHOLE)


def downgrade() -> None:
    op.execute(DROPS)
