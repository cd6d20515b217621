"""The files of a table in a contract folder: which they are, and their bytes, unpacked and bounded."""

import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from polytower.errors import UserError

TABLES = ("items", "users", "interactions")
FORMATS = ("parquet", "csv", "jsonl")
# Text unfolds ten- or twentyfold; what unfolds more than this, and beyond a size that does no harm, is a bomb.
MAX_UNFOLDING = 200
HARMLESS_BYTES = 64 << 20

_LOOKS_LIKE = re.compile(r"(item|user|interaction)s?(?![a-z])")
_PACKED = r"(gz|zip|bz2|xz|zst|7z|lz4|snappy|tgz)"
_DATA = re.compile(
    r".*\.((parquet|pq|csv|tsv|tab|txt|psv|jsonl?|ndjson|xlsx?|ods|avro|orc|arrow|feather|ipc|sqlite|db|xml)"
    rf"(\.{_PACKED})?|{_PACKED})"
)
_WAYS_OUT = {
    ".tsv": "write it with commas, as {table}.csv",
    ".json": "with one object per line, call it {table}.jsonl; convert an array: jq -c '.[]' {name} > {table}.jsonl",
    ".ndjson": "rename it to {table}.jsonl",
    ".xlsx": "save it as CSV (UTF-8), {table}.csv",
    ".zip": "unpack it",
}
_MAGIC = {b"\x1f\x8b": "gzip (name it .gz)", b"PK\x03\x04": "a zip file or a spreadsheet", b"PAR1": "Parquet"}
_OTHER_UNICODE = (b"\xff\xfe", b"\xfe\xff")


def parts_of(folder: Path, table: str) -> tuple[Path, str, list[Path]] | None:
    """(file or folder, format, its part files) of a table, or None. UserError where more than one could be meant."""
    found = [
        (path, form)
        for form in FORMATS
        for path in (folder / f"{table}.{form}", folder / f"{table}.{form}.gz")
        if path.is_file() or path.is_dir()
    ]
    if len(found) > 1:
        names = " and ".join(path.name for path, _ in found)
        raise UserError(f"{folder} has {names}: keep only one of them")
    if not found:
        return None
    path, form = found[0]
    if path.name.endswith(".parquet.gz"):
        raise UserError(f"{path.name}: Parquet files are already compressed; unpack it: gunzip {path.name}")
    return path, form, _parts(path, form) if path.is_dir() else [path]


def refuse_overlooked(folder: Path) -> list[str]:
    """UserError for a data file that looks like one of the tables and is none; names of other look-alikes."""
    taken = {f"{table}.{form}{gz}" for table in TABLES for form in FORMATS for gz in ("", ".gz")}
    others = []
    for path in sorted(folder.iterdir()):
        name = path.name.strip().casefold()
        looks = _LOOKS_LIKE.match(name)
        if path.name in taken and not (path.is_file() or path.is_dir()):
            raise UserError(f"{folder}: {path.name} is neither a file nor a folder (a broken link, or a pipe)")
        if path.name in taken or not looks or (path.is_dir() and not _holds_data(path)):
            continue
        if not (_DATA.fullmatch(name) or path.is_dir() or "." not in name):
            others.append(path.name)
            continue
        table = f"{looks[1]}s"
        out = _WAYS_OUT.get(path.suffix.casefold(), f"call it {table}.parquet, {table}.csv or {table}.jsonl")
        message = f"{folder} has {path.name}, which looks like the table {table} but would not be read"
        raise UserError(f"{message}: {out.format(table=table, name=path.name)}, or move it out of the folder")
    return others


def _holds_data(folder: Path) -> bool:
    return any(_DATA.fullmatch(path.name.casefold()) for path in folder.iterdir() if path.is_file())


def _parts(folder: Path, form: str) -> list[Path]:
    """Data files of a folder of parts, by name; what begins with _ or . is the writer's own (_SUCCESS, checksums)."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(("_", ".")))
    endings = {
        "parquet": (".parquet",),
        "csv": (".csv", ".csv.gz"),
        "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    }
    for path in found:
        if path.is_dir():
            raise UserError(
                f"{folder.name}/{path.name} is a folder: the rows of parts partitioned into folders (name=value) lack "
                "that column; write them without partitions"
            )
        if not path.name.endswith(endings[form]):
            raise UserError(f"{folder.name}/{path.name} is not a part of {folder.name} (*{', *'.join(endings[form])})")
    if not found:
        raise UserError(f"{folder.name} has no part files; leave it out if there is nothing to load")
    return found


class PassingBytes(io.RawIOBase):
    """A file's bytes, unpacked if it is packed; `seen` is shown each chunk. UserError for a bomb."""

    def __init__(self, path: Path, name: str, seen: Callable[[bytes], Any] | None = None) -> None:
        self._file = cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))  # noqa: SIM115 close()
        self._name = name
        self._seen = seen
        self._left = max(MAX_UNFOLDING * path.stat().st_size, HARMLESS_BYTES) if path.suffix == ".gz" else None

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer."""
        try:
            chunk = self._file.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self._name} cannot be unpacked (truncated or corrupt?): {error}; compress it again"
            ) from None
        if self._left is not None:
            self._left -= len(chunk)
            if self._left < 0:
                raise UserError(
                    f"{self._name} unpacks to more than {MAX_UNFOLDING} times its size; if that is right, unpack it: "
                    f"gunzip {self._name}"
                )
        if self._seen is not None:
            self._seen(chunk)
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        """Closes the file below as well."""
        if not self.closed:
            self._file.close()
        super().close()


def opened(path: Path, name: str, seen: Callable[[bytes], Any] | None = None) -> io.BufferedReader:
    """The bytes of a text file; UserError for what is no text in UTF-8 by its first bytes."""
    with PassingBytes(path, name) as file:
        head = file.read(4096) or b""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{name} is {what}, not {'CSV' if '.csv' in name else 'JSON lines'}")
    if head.startswith(_OTHER_UNICODE) or head.count(0) > len(head) // 4:
        raise UserError(f"{name} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {name} > new")
    return io.BufferedReader(PassingBytes(path, name, seen), 1 << 20)
