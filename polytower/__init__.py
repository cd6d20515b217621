"""polytower: a feature-store-centric embedding platform for recommendation."""

__version__ = "0.1.0"
