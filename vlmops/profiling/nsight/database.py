"""A SQLite file from elsewhere, read as data: never written, never trusted to be what it says."""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlmops.profiling.nsight.errors import ProfileFileError

__all__ = ["Database", "opened"]

MAGIC = b"SQLite format 3\0"
MAX_BYTES = 16 << 30
MAX_ROWS = 20_000_000  # of one table
MAX_TEXT = 1 << 20  # bytes of one value
SECONDS, STEPS = 600.0, 100_000  # for one file; looked at every so many steps of SQLite


class Database:
    """Tables of an open file. Only names of this package's own code reach SQL.

    Args:
        path: the file, for messages.
        connection: read-only.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        # a view or a virtual table may run anything, and may never end
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE%'")
        self.tables = {str(name) for (name,) in found}

    def columns(self, table: str) -> set[str]:
        """Names of a table's columns; none where it is not there."""
        if table not in self.tables:
            return set()
        return {str(row[1]) for row in self._connection.execute(f'PRAGMA table_info("{table}")')}

    def rows(self, table: str, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows in the order of the file, nothing where there is no such table.

        Args:
            table: its name.
            required: columns.
            optional: columns that older releases do not write: None there.

        Raises:
            ProfileFileError: a required column is missing, or there are more than ``MAX_ROWS`` rows.
        """
        there = self.columns(table)
        if not there:
            return
        missing = [name for name in required if name not in there]
        if missing:
            raise ProfileFileError(self.path, f"table {table} has no column {', '.join(missing)}")
        wanted = [f'"{name}"' if name in there else "NULL" for name in (*required, *optional)]
        for count, row in enumerate(self._connection.execute(f'SELECT {", ".join(wanted)} FROM "{table}"')):
            if count >= MAX_ROWS:
                raise ProfileFileError(self.path, f"table {table} has more than {MAX_ROWS} rows: record a shorter time")
            yield row


def _check_header(path: Path, hint: str) -> None:
    """That this is a whole SQLite file, from its first 100 bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(MAGIC):
        raise ProfileFileError(path, f"no SQLite file: {hint}")
    if size > MAX_BYTES:
        raise ProfileFileError(
            path, f"{size / 2**30:.1f} GiB, at most {MAX_BYTES >> 30} are read: record a shorter time"
        )
    page, pages = struct.unpack(">H", head[16:18])[0], struct.unpack(">I", head[28:32])[0]
    page = 65536 if page == 1 else page
    if page * pages > size:
        raise ProfileFileError(path, f"truncated: {size} bytes of {page * pages}")


@contextlib.contextmanager
def opened(path: Path, hint: str) -> Iterator[Database]:
    """A file's tables inside the block.

    Args:
        path: the file.
        hint: what kind of file is expected, for messages.

    Raises:
        ProfileFileError: no SQLite file, truncated, or damaged where the block reads it.
        OSError: it cannot be opened.
    """
    _check_header(path, hint)
    deadline = time.monotonic() + SECONDS
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as connection:
            connection.text_factory = lambda text: text.decode("utf-8", "replace")
            connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
            if hasattr(connection, "setlimit"):  # Python 3.11
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
            for pragma in ("query_only = ON", "trusted_schema = OFF", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {pragma}")
            yield Database(path, connection)
    except (sqlite3.Error, UnicodeDecodeError) as err:  # the latter where SQLite's own message quotes the damage
        raise ProfileFileError(path, f"damaged, or {hint}: SQLite says {str(err)!r}") from err
