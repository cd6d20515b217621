"""Retrieval scans catalogues of up to 20,000 items, as the server does, instead of walking the index.

Compatibility: the function keeps its signature; older code gets exact answers where it got nearly exact ones.
"""

from migrations.install import install

revision = "0071"
down_revision = "0070"
branch_labels = None
depends_on = None


def upgrade() -> None:
    install("retrieve_vectors", 2)


def downgrade() -> None:
    install("retrieve_vectors", 1)
