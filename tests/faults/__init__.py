"""Rounds of kill −9: `make test-faults ROUNDS=100 SEED=7` (see __main__.py)."""
