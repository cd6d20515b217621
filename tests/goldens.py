"""Golden files: what others rely on, frozen. `UPDATE_GOLDEN=1 pytest tests/test_goldens.py` writes them anew."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name: str, found: str) -> None:
    """Compares with the golden file; with UPDATE_GOLDEN set, writes it."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"{name} changed; if that is meant: UPDATE_GOLDEN=1 pytest tests/test_goldens.py"
