"""Offline evaluation: splits, metrics, baselines, full ranking."""
