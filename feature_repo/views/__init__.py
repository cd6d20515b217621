"""The feature views: one declaration each, and how all of them are read and written."""

from feature_repo.views import (
    item_activity,
    item_attributes,
    item_content,
    item_embedding,
    item_stats,
    user_activity,
    user_interests,
    user_profile,
    user_sequence,
    user_stats,
)
from feature_repo.views.view import View

# By name, in the order of a service's answer.
VIEWS: dict[str, View] = {
    module.VIEW.name: module.VIEW
    for module in (
        user_sequence,
        user_interests,
        user_stats,
        user_activity,
        user_profile,
        item_attributes,
        item_content,
        item_embedding,
        item_stats,
        item_activity,
    )
}


def views_of(service: str) -> list[View]:
    """The views of a feature service; none for a service that does not exist."""
    return [view for view in VIEWS.values() if service in view.services]
