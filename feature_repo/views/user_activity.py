"""How much a user did lately."""

from feature_repo.schema import USER
from feature_repo.views.windows import windowed_counts

VIEW = windowed_counts("user_activity", USER, "user_stats")
