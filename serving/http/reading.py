"""JSON from outside: brackets without end and numbers of 5,000 digits are the fault of who sent them."""

import json
from typing import Any

from serving.errors import Kind, Problem


def json_of(content: str | bytes, kind: Kind, what: str) -> Any:
    """The value. Raises Problem of this kind: `what` is not JSON, and why."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise Problem(kind, f"{what}: is nested too deeply") from error
    except ValueError as error:
        raise Problem(kind, f"{what}: is not JSON: {error}") from error
