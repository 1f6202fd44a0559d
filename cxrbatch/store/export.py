"""Write rows of the view `results` as CSV, JSON lines or Parquet: streamed, and atomically (output_file.py).

"-" is standard output. Times are UTC, 'YYYY-MM-DD HH:MM:SS'. Paths are as the store keeps them (paths.py), except for
line breaks in a CSV: see `write_csv`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.output_file import EarlierOutput, check_target, new_file, starts_with
from cxrbatch.store.sql import Utc, chunks, utc_text
from cxrbatch.store.views import RESULT_COLUMNS, results

__all__ = ["CsvLines", "check_writable", "defused", "write_csv", "write_jsonl", "write_parquet", "writer_for"]

Rows = Iterable[Sequence[Any]]  # values in the order of RESULT_COLUMNS
Writer = Callable[[str, Rows], int]

#: A spreadsheet treats a cell that starts with one of these as a formula, and may run it.
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")
#: A program that splits by lines and ignores quotes takes the second line of a cell for a cell of its own.
_FORMULA_OF_A_LINE = re.compile(r"(?<=[\r\n])(?=[=+\-@\t＝＋－＠])")
_ROW_GROUP = 5_000  # rows of Parquet in memory at a time
_NOTE = "cxrbatch: for research; decision support only, not a diagnosis"


def writer_for(path: str) -> Writer:
    """The function that writes files with this suffix. Raises Fatal for an unknown suffix."""
    writers = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise Fatal(f"An export is a .csv, .jsonl or .parquet file, not {path!r}.", ExitCode.USAGE)
    return writers[suffix]


def check_writable(path: str, write: Writer | None = None) -> None:
    """Raise Fatal, before any work is done, if `write` (default: by the suffix) to `path` would fail."""
    if write is None:
        write = write_csv if path == "-" else writer_for(path)
    if write is write_parquet:
        _pyarrow()
        _no_standard_output(path)
    if path != "-":
        check_target(path, _EARLIER[write])


def write_csv(path: str, rows: Rows) -> int:
    """Write rows as UTF-8 CSV with a header; returns how many.

    A cell that a spreadsheet would run is prefixed with ', and so is each further line of a cell (a file name may
    contain line breaks). A cell with a line break is quoted.
    """
    with _text_target(path, write_csv) as file:
        # Before Python 3.13, csv quotes a cell with \r only if the line terminator contains \r.
        writer = csv.writer(CsvLines(file), lineterminator="\r\n")
        writer.writerow(RESULT_COLUMNS)
        count = 0
        for row in rows:
            # Most cells are text, numbers or empty: they are handled here to avoid a call per cell.
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


def defused(text: str) -> str:
    """A cell that a spreadsheet does not run."""
    return "'" + text if text[:1] in _FORMULA else text


class CsvLines:
    """Writes rows that end with CR LF with LF instead; any earlier line break is inside a quoted cell."""

    def __init__(self, file: IO[str]) -> None:
        self._write = file.write

    def write(self, row: str) -> int:
        row = row[:-2]
        if "\n" in row or "\r" in row:
            row = _FORMULA_OF_A_LINE.sub("'", row)
        return self._write(row + "\n")


def write_jsonl(path: str, rows: Rows) -> int:
    """Write rows as one JSON object a line, UTF-8; returns how many."""
    with _text_target(path, write_jsonl) as file:
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
    _no_standard_output(path)
    schema = _arrow_schema(pyarrow)
    count = 0
    with new_file(path, _EARLIER[write_parquet]) as file, parquet.ParquetWriter(file, schema) as writer:
        for chunk in chunks(rows, _ROW_GROUP):
            columns = zip(*chunk, strict=True)
            arrays = [pyarrow.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            count += len(chunk)
    return count


def _no_standard_output(path: str) -> None:
    if path == "-":
        raise Fatal("Parquet does not go to standard output: name a file.")


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
def _text_target(path: str, write: Writer) -> Iterator[IO[str]]:
    if path == "-":
        file = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", newline="")
        try:
            yield file
            file.flush()
        finally:
            file.detach()  # standard output stays open for others
        return
    with new_file(path, _EARLIER[write]) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        yield file
        file.flush()
        file.detach()  # the binary file is closed by its own block, after fsync


def _earlier_parquet(first: bytes, last: bytes) -> bool:
    return first.startswith(b"PAR1") and _NOTE.encode() in last


_EARLIER: dict[Writer, EarlierOutput] = {
    write_csv: starts_with(",".join(RESULT_COLUMNS[:2]).encode() + b","),
    write_jsonl: starts_with(f'{{"{RESULT_COLUMNS[0]}": '.encode()),
    write_parquet: _earlier_parquet,
}
