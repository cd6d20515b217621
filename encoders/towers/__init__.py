"""The towers and what teaches them: item and user tower, interests, fusions, losses."""
