"""Texts in a column of CSV and Parquet files."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax import files

_ROWS_PER_BATCH = 64  # of a Parquet file, whose texts may be long


def read_csv(lines: Iterable[bytes], path: Path, field: str, limit: int) -> Iterator[bytes]:
    """Yields the text of each row of a CSV file whose first row has the names of its columns.

    Args:
        lines: Lines of the file.
        path: Its path, for error messages.
        field: Name of the column.
        limit: Largest size of a value in characters.

    Raises:
        ValueError: The file is not CSV, there is no such column, or a row has more or fewer values than columns.
    """
    csv.field_size_limit(limit)
    # Bytes that are not UTF-8 pass through unchanged; they are counted and replaced where the text is.
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in lines), strict=True)
    try:
        names = next(rows, [])
        column = _index(names, field, path)
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(f"{path} line {rows.line_num}: {len(row)} values for {len(names)} columns")
            if row:
                yield row[column].encode("utf-8", "surrogateescape")
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: not CSV: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[bytes]:
    """Yields the text of each row of a Parquet file, in memory proportional to one row group.

    Args:
        path: The file.
        field: Name of the column.

    Raises:
        ValueError: The file is damaged, has no such column of texts, or a text is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow ({error}): pip install -e '.[parquet]'") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema: Any = file.schema_arrow
            kind = schema.field(_index(schema.names, field, path)).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise ValueError(f"{path}: column {field!r} must be of texts: got {kind}")
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=[field]):
                # As bytes, because pyarrow does not check that texts are UTF-8.
                for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if text is None:
                        raise ValueError(f"{path} row {row}: column {field!r} must be a text: got null")
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or cut short, or not Parquet: {files.shortened(detail)}") from error


def _index(names: list[str], field: str, path: Path) -> int:
    if names.count(field) != 1:
        found = files.shortened(", ".join(map(repr, names))) or "none"
        number = "several columns" if field in names else "no column"
        raise ValueError(f"{path} has {number} {field!r}: its columns are {found}. Name the one with --text-field")
    return names.index(field)
