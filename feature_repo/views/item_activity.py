"""How much an item was met lately."""

from feature_repo.schema import ITEM
from feature_repo.views.windows import windowed_counts

VIEW = windowed_counts("item_activity", ITEM, "item_stats")
