"""How many records a CSV file holds, counted beside the reader; and what is wrong with one that cannot be read.

A quote that is never closed makes one field of the rest of a file, and readers say nothing.
"""

import csv
import io
from collections.abc import Callable
from typing import IO

import numpy as np

from polytower.errors import UserError

Opener = Callable[[], IO[bytes]]

# Longest row of a CSV or JSON lines file: what is longer is no row.
MAX_ROW_BYTES = 8 << 20
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_QUOTE, _LF, _CR = b'"\n\r'
# By byte: what may stand beside a quote that opens or closes a field; what ends a line.
_BESIDE, _END = np.zeros((2, 256), bool)
_BESIDE[list(b'",\n\r')] = True
_END[list(b"\n\r")] = True


class RecordCounter:
    """Counts records as the bytes pass by. Exact when every quote is regular: one that opens or closes a whole field.

    records: ends of lines outside of quotes, empty lines left out (the reader skips them too).
    """

    def __init__(self) -> None:
        self.records = 0
        self.regular = True
        self._inside = 0  # 1: within quotes
        self._held = b"\n\n"  # the two bytes before, and the last one, whose follower is not known yet

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes of the file."""
        window = np.frombuffer(self._held + chunk, np.uint8)
        self._held = window[-3:].tobytes()
        if len(window) > 3:
            self._count(window)

    def finish(self) -> None:
        """The file is at its end."""
        ends_open = self._held[-1:] not in (b"\n", b"\r")
        self.feed(b"\n," if ends_open else b",")
        self.regular = self.regular and not self._inside

    def _count(self, window: np.ndarray) -> None:
        now = window[2:-1]
        quotes = np.flatnonzero(now == _QUOTE) + 2
        ends = np.flatnonzero(_END[now]) + 2
        ends = ends[(window[ends] == _LF) | (window[ends + 1] != _LF)]
        if len(quotes):
            parity = (np.arange(len(quotes)) + self._inside) & 1
            before, after = window[quotes - 1], window[quotes + 1]
            self.regular = self.regular and bool(_BESIDE[np.where(parity == 1, after, before)].all())
            inside = (np.searchsorted(quotes, ends) + self._inside) & 1
            ends = ends[inside == 0]
            self._inside = (len(quotes) + self._inside) & 1
        elif self._inside:
            return
        crlf = (window[ends] == _LF) & (window[ends - 1] == _CR)
        before = np.where(crlf, window[ends - 2], window[ends - 1])
        self.records += int(np.count_nonzero(~_END[before]))


def count_strictly(name: str, opened: Opener) -> int:
    """Records by Python's own reader; UserError, naming the row, where a quote is never closed or closes too early."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with opened() as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        reader = csv.reader(text, strict=True)
        records = lines = 0
        try:
            for record in reader:
                records += bool(record)
                lines = reader.line_num
        except csv.Error as error:
            where = f"{name}, row {records} (line {lines + 1})" if records else f"{name}, the header"
            if "field limit" in str(error):
                size = f"a field of more than {MAX_ROW_BYTES >> 20} MiB"
                raise UserError(f"{where}: {size}; shorten it, or close the quote it starts with") from None
            if "unexpected end" in str(error):
                raise UserError(
                    f"{where}: a quote is opened but never closed; close it, or double it inside a field"
                ) from None
            raise UserError(
                f'{where}: text follows a closing quote, so one is missing or not doubled ("") in this row'
            ) from None
    return records


def check_header(name: str, header: str) -> None:
    """UserError where another character than the comma separates the columns."""
    found = [separator for separator in SEPARATORS if separator in header and "," not in header]
    if found:
        convert = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={found[0]!r}))"
        raise UserError(
            f"{name} is separated by {SEPARATORS[found[0]]}, not by commas (and its numbers may have decimal commas, "
            f'which must become points); rewrite it: python -c "{convert}" < {name} > new.csv'
        )


def explain(name: str, opened: Opener, error: str) -> UserError:
    """What is wrong with a CSV file that the reader gave up on; each kind with its way out."""
    refuse_other_text(name, opened)
    records = count_strictly(name, opened)  # an open quote explains everything that comes after it
    if "straddling" in error:
        return UserError(f"{name}: one of its {records:,} records is longer than {MAX_ROW_BYTES >> 20} MiB; shorten it")
    with opened() as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline=""))
        rows = filter(None, reader)
        width = len(next(rows, []))
        for number, row in enumerate(rows, start=1):
            if len(row) != width:
                where = f"{name}, row {number} (line {reader.line_num})"
                return UserError(
                    f"{where} has {len(row)} fields, but the header has {width}; quote fields that contain commas"
                )
    return UserError(f"{name} cannot be read as CSV (truncated or corrupt?): {error}; write it again")


def refuse_other_text(name: str, opened: Opener) -> None:
    """UserError, naming the line, where the file is not UTF-8."""
    with opened() as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES), b""), start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                if len(line) < MAX_ROW_BYTES:
                    raise UserError(
                        f"{name}, line {number} is not UTF-8 text (Latin-1 or Windows-1252?); convert it: "
                        f"iconv -f WINDOWS-1252 -t UTF-8 {name} > new"
                    ) from None
