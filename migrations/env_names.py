"""Which tables and indexes alembic looks at."""

import re
from typing import Any

# Partitions belong to the data (generation, year), and ANN indexes to their generation.
RUNTIME_TABLE = re.compile(r"_(g\d+|y\d+)$")
# Of a content encoder's own space (pipelines/content_index.py).
RUNTIME_INDEX = re.compile(r"^content_embeddings_.*_hnsw$")


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Leaves what is made at run time out of autogenerate's comparison."""
    made = {"table": RUNTIME_TABLE, "index": RUNTIME_INDEX}.get(kind)
    return not (made is not None and name is not None and made.search(name))
