"""The feature repository: the contract of names, and the Feast objects over the platform's own tables."""

from feature_repo.lazy_torch import defer_torch

# Whoever imports a name from here may import feast next, and feast would bring torch.
defer_torch()
