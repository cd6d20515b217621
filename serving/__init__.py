"""The query layer: retrieval over SQL and HTTP, features for rankers; torch loads only when a tower is asked for."""
