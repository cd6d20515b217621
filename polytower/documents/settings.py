"""docs/reference/settings.md: every environment variable, from the docstring of `Settings`."""

import inspect
import re
from dataclasses import fields

from polytower.documents.markdown import bullets
from polytower.settings import Settings

HEAD = """# Settings

Environment variables say where things are and which encoders run. Everything that changes a result is an option of a
preset instead: `polytower materialize --set NAME=JSON` ([models](../models.md)). A value that cannot be read is an
error, never a default.

"""
ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.+?)(?=^\w+(?:, \w+)*: |\Z)", re.MULTILINE | re.DOTALL)


def page() -> str:
    """The page. Raises KeyError for a setting that its docstring does not explain."""
    told = {
        name: " ".join(text.split())
        for names, text in ENTRY.findall(inspect.getdoc(Settings) or "")
        for name in names.split(", ")
    }
    return HEAD + bullets((f"`POLYTOWER_{field.name.upper()}`", told[field.name]) for field in fields(Settings))
