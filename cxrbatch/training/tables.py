"""CSV tables beside images: manifest.csv, labels.csv and lists of files."""

from __future__ import annotations

import csv
from pathlib import Path

from cxrbatch.errors import Fatal

__all__ = ["read_rows"]


def read_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a table with at least these columns. Raises Fatal if one is missing or the file cannot be read."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets write the mark
            rows = csv.DictReader(lines)
            if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
                raise Fatal(f"{file} has no column '{missing[0]}'.")
            found = []
            for row in rows:
                if empty := [name for name in columns if row[name] is None]:
                    raise Fatal(f"Line {rows.line_num} of {file} has no '{empty[0]}': it has too few columns.")
                found.append(row)
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", str(error))
        raise Fatal(f"{file} cannot be read ({why}).") from None
