"""docs/code/: a map of the files, one page for each top-level folder: the first sentence of each module's docstring."""

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from polytower.documents.markdown import bullets, paragraph

FOLDERS = ("feature_repo", "encoders", "pipelines", "migrations", "serving", "polytower")
# Named by number and described in the files themselves; nobody looks for one by its job.
LEFT_OUT = ("versions",)


def page(folder: Path) -> Callable[[], str]:
    """Makes the page of a folder."""
    return partial(_page, folder)


def _page(folder: Path) -> str:
    wings = sorted(path.parent for path in folder.glob("*/__init__.py") if path.parent.name not in LEFT_OUT)
    return f"# {folder.name}\n\n{_files(folder)}" + "".join(
        f"\n## {folder.name}/{wing.name}\n\n{_files(wing)}" for wing in wings
    )


def _files(folder: Path) -> str:
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))
    listed = bullets((f"`{path.name}`", purpose(path)) for path in files)
    return f"{paragraph(purpose(folder / '__init__.py'))}\n\n{listed}".rstrip() + "\n"


def purpose(path: Path) -> str:
    """The first sentence of the module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`\"]\.)\s", paragraph)[0]
