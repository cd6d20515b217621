"""Dagster: assets, checks, jobs and resources, thin over plain functions."""
