"""Rows of the view `results` as CSV, JSON lines or Parquet: streamed, and there whole or not at all.

A file is written beside its name (`.NAME.part`), flushed to the disk and renamed. "-" is standard output.
Times are UTC, 'YYYY-MM-DD HH:MM:SS'; paths are as the store keeps them (paths.py).
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from cxrbatch.errors import Fatal
from cxrbatch.store.columns import Utc, utc_text
from cxrbatch.store.keys import chunks
from cxrbatch.store.views import RESULT_COLUMNS, results

__all__ = ["check_writable", "write_csv", "write_jsonl", "write_parquet", "writer_for"]

Rows = Iterable[Sequence[Any]]  # values in the order of RESULT_COLUMNS

#: A spreadsheet takes a cell that starts so for a formula, and may run it.
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")
_ROW_GROUP = 5_000  # rows of Parquet in memory at a time
_NOTE = "cxrbatch: for research; decision support only, not a diagnosis"


def writer_for(path: str) -> Callable[[str, Rows], int]:
    """The function that writes this kind of file, by its suffix. Raises Fatal for another suffix."""
    writers = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise Fatal(f"An export is a .csv, .jsonl or .parquet file, not {path!r}.")
    return writers[suffix]


def check_writable(path: str) -> None:
    """Raises Fatal, before any work is done, where an export to `path` would fail."""
    if path.lower().endswith(".parquet"):
        _pyarrow()
    if path == "-" or _is_device(path):
        return
    with _temporary(os.path.realpath(path)) as (_, name):
        os.unlink(name)


def write_csv(path: str, rows: Rows) -> int:
    """Write rows as UTF-8 CSV with a header; returns how many. Cells that a spreadsheet would run get a '."""
    with _text_target(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(RESULT_COLUMNS)
        count = 0
        for row in rows:
            # By far the most cells are text, numbers or empty: they are done here, without a call each.
            writer.writerow(
                [
                    ("'" + value if value[:1] in _FORMULA else value)
                    if type(value) is str
                    else (value if value is None or type(value) is float else _cell(value))
                    for value in row
                ]
            )
            count += 1
    return count


def write_jsonl(path: str, rows: Rows) -> int:
    """Write rows as one JSON object a line, UTF-8; returns how many."""
    with _text_target(path) as file:
        count = 0
        for row in rows:
            values = (utc_text(value) if isinstance(value, datetime) else value for value in row)
            document = dict(zip(RESULT_COLUMNS, values, strict=True))
            file.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def write_parquet(path: str, rows: Rows) -> int:
    """Write rows as Parquet; returns how many. Needs the extra `parquet`."""
    pyarrow, parquet = _pyarrow()
    if path == "-":
        raise Fatal("Parquet does not go to standard output: name a file.")
    schema = _arrow_schema(pyarrow)
    count = 0
    with _binary_target(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for chunk in chunks(rows, _ROW_GROUP):
            columns = zip(*chunk, strict=True)
            arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            count += len(chunk)
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return utc_text(value) if isinstance(value, datetime) else value


def _arrow_schema(pyarrow: Any) -> Any:
    def arrow_type(kind: object) -> Any:
        if isinstance(kind, Utc):
            return pyarrow.timestamp("ms", tz="UTC")
        if isinstance(kind, sa.Boolean):
            return pyarrow.bool_()
        if isinstance(kind, sa.Double):
            return pyarrow.float64()
        return pyarrow.int64() if isinstance(kind, sa.Integer) else pyarrow.string()

    fields = [pyarrow.field(column.name, arrow_type(column.type)) for column in results.columns]
    return pyarrow.schema(fields, metadata={"note": _NOTE})


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Fatal("Parquet needs an extra: pip install 'cxrbatch[parquet]'.") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _text_target(path: str) -> Iterator[IO[str]]:
    if path == "-":
        file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
        try:
            yield file
            file.flush()
        finally:
            file.detach()  # standard output stays open for others
        return
    with _binary_target(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield file
        file.flush()
        file.detach()  # the binary file is closed by its own block, after fsync


@contextmanager
def _binary_target(path: str) -> Iterator[IO[bytes]]:
    if _is_device(path):  # /dev/stdout, a FIFO: nothing that could be renamed
        with open(path, "wb") as file:
            yield file
        return
    target = os.path.realpath(path)
    with _temporary(target) as (file, name):
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    with suppress(OSError):  # some network file systems do not do this
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _temporary(target: str) -> Iterator[tuple[IO[bytes], str]]:
    """An empty file beside `target`, ours alone; what a killed program left under this name is overwritten.

    Raises Fatal where it can't be made or another program is writing it.
    """
    folder, base = os.path.split(target)
    # A file name holds 255 bytes, and ours is longer than the target's.
    name = os.path.join(folder, "." + os.fsdecode(os.fsencode(base)[:240]) + ".part")
    if os.path.isdir(target):
        raise Fatal(f"The export {target} cannot be written: it is a folder.")
    try:
        file = open(name, "ab")  # noqa: SIM115 - closed below; not truncated before it is ours
    except OSError as error:
        raise Fatal(f"The export {target} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
        except BlockingIOError:
            ours = False
        except FileNotFoundError:
            ours = False
        except OSError:
            ours = True  # a file system without locks
        if not ours:  # also when the other one renamed it between our open and our lock
            raise Fatal(f"The export {target} is being written by another program.")
        file.truncate(0)
        yield file, name


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
