"""Dagster assets and the plain functions under them: data in, embeddings and generations out."""
