"""A moment on the command line: a date, or a date and a time, of UTC unless it says otherwise."""

from datetime import UTC, datetime
from typing import Any

import click


class Moment(click.ParamType[datetime]):
    """ISO 8601, as a datetime with its zone."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Fails with an example."""
        try:
            found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a date or time such as 2000-12-01 or 2000-12-01T18:30+02:00", param, ctx)
        return found if found.tzinfo else found.replace(tzinfo=UTC)
