"""Experiments without a database: train, evaluate, compare."""
