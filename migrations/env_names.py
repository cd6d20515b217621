"""Which tables alembic looks at."""

import re
from typing import Any

# Partitions belong to the data (generation, year), and ANN indexes to their generation.
RUNTIME_TABLE = re.compile(r"_(g\d+|y\d+)$")


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Leaves run-time partitions out of autogenerate's comparison."""
    return not (kind == "table" and name is not None and RUNTIME_TABLE.search(name))
