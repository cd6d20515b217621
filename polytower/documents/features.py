"""docs/reference/features.md: every feature view with its features and services, from the declarations."""

from feature_repo.schema import SERVICES
from feature_repo.views import VIEWS, views_of
from feature_repo.views.view import Feature, View
from polytower.documents.markdown import bullets, paragraph

HEAD = """# Feature views

Declared in `feature_repo/views/`, one file each. [The guide](../features.md) shows how to read and write them, and what
a row knows at a moment.
"""


def page() -> str:
    """The page: services, then views in the order of an answer."""
    services = bullets(
        (f"`{name}`", f"{words}. Views: {', '.join(f'`{view.name}`' for view in views_of(name))}.")
        for name, words in SERVICES.items()
    )
    return f"{HEAD}\n## Services\n\n{services}\n" + "".join(map(_section, VIEWS.values()))


def _section(view: View) -> str:
    from feature_repo.definitions import DTYPES

    features = bullets((f"`{each.name}` ({DTYPES[each.kind]})", _words(each)) for each in view.features)
    told = f"{view.description}. By `{view.key}`. {_written(view)}"
    return f"\n## {view.name}\n\n{paragraph(told)}\n\n{features}\n"


def _words(feature: Feature) -> str:
    return f"{feature.description}." if feature.description else ""


def _written(view: View) -> str:
    if view.table is None:
        return "Immutable: a write of other values than those stored is refused."
    by = "entity and day (UTC)" if view.table.daily else "entity"
    return f"Writes go to the table `{view.table.name}`, one row per {by}."
