"""The feature repository: the contract of names, and the Feast objects over the platform's own tables."""

from feature_repo.tame_feast import tame_feast

# Whoever imports a name from here may import feast next.
tame_feast()
