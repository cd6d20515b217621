"""The example of docs/data.md does what the page says."""

import os
import re
import subprocess
from pathlib import Path

import psycopg

from pipelines.load.folder import load_folder

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example_loads(emptied: psycopg.Connection, tmp_path: Path) -> None:
    [script] = re.findall(r"```sh\n(.*?)polytower load shop\n```", PAGE.read_text(), re.DOTALL)
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)
    counts = load_folder(emptied, tmp_path / "shop").counts
    assert (counts["items_new"], counts["interactions_new"], counts["interactions_rejected"]) == (2, 3, 0)
    items = emptied.execute("select item_id, available, attributes from items order by 1").fetchall()
    assert items == [
        ("mug", True, {"price": 9.5, "tags": ["kitchen", "gift"]}),
        ("pan", False, {"price": 39, "tags": ["kitchen"]}),
    ]
    searched = emptied.execute("select occurred_at::text, query from interactions where kind = 'search'").fetchall()
    assert searched == [("2024-05-02 16:00:00+00", "iron pan")]
    assert load_folder(emptied, tmp_path / "shop").counts["interactions_unchanged"] == 3
