"""Does a number keep its digits? What is kept as a number must be the same number when it is read again."""

import math
import re
from decimal import Decimal

# Integers up to here are floats without loss, in every program that reads JSON.
LARGEST_INTEGER = 2**53

_NUMBER = re.compile(r"-?(?P<whole>0|[1-9]\d*)(?P<part>\.\d+)?([eE](?P<sign>[+-]?)\d+)?", re.ASCII)


class Written(str):
    """A JSON number as it was written, because no float has its digits."""

    __slots__ = ()


def is_number(text: str) -> bool:
    """Whether the text of a cell is a number that survives being one.

    A leading zero means a code (a zip, a phone number), and so does an exponent that no program writes: programs write
    one digit before the point, and a point or a sign (1.2E13, 1e-05; not 12E12, not 5E10).
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return False
    if found["sign"] is not None and (len(found["whole"]) > 1 or not (found["part"] or found["sign"])):
        return False
    return survives(text)


def survives(text: str) -> bool:
    """Whether a float, written with as many digits as the text has, is the same number; integers up to 2^53."""
    mantissa, _, exponent = text.lower().partition("e")
    if not exponent and "." not in mantissa:
        return len(mantissa) <= 17 and abs(int(mantissa)) <= LARGEST_INTEGER
    digits = len(mantissa.replace(".", "").lstrip("-0").rstrip("0"))
    if digits <= 15 and not exponent:
        return True
    value = float(text)
    if not math.isfinite(value) or digits > 17:
        return False
    return Decimal(text) in (Decimal(repr(value)), Decimal(format(value, f".{max(digits, 1)}g")))
