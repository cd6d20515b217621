"""The HTTP API: routes, limits, keys, problems."""
