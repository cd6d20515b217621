"""A typed client of the HTTP API."""

from polytower.client.client import *  # noqa: F403
