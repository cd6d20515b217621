"""Feast's stores over the platform's own tables: online, offline, and materialisation between them."""
