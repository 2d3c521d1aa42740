"""Rows out of jsonl, json, parquet and csv files, as plain Python values.

What comes back is JSON-like whatever the file was: dicts, lists, text, numbers, booleans and None (NaN counts as None),
so that nothing after this module needs to know about formats.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradvar.errors import GradvarError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""File types that can be read, told by the suffix."""


def read_rows(path: str | Path, *, suffixes: tuple[str, ...] = SUFFIXES) -> list[Any]:
    """Reads every row of a file.

    Args:
        path: A file whose suffix is one of `suffixes`. A .json file holds a list of rows; one that holds a JSON object
            on each line is read as .jsonl.
        suffixes: The suffixes allowed here.

    Returns:
        The rows in the file's order, at least one; a dict a row, except in .json files whose list holds other things.

    Raises:
        GradvarError: No such file, unknown suffix, not UTF-8, broken (with the line), or without rows.
    """
    file = Path(path)
    if not file.is_file():
        what = "this is a folder" if file.is_dir() else "no such file"
        raise GradvarError(f"{file}: {what}; expected a file ending in {_listed(suffixes)}")
    suffix = file.suffix.lower()
    if suffix not in suffixes:
        raise GradvarError(
            f"{file}: the suffix {file.suffix!r} is not known; expected a file ending in {_listed(suffixes)}"
        )
    try:
        if suffix == ".parquet":
            rows = _read_parquet(file)
        elif suffix == ".csv":
            rows = _read_csv(file)
        elif suffix == ".jsonl":
            rows = list(_parse_lines(file, _read_text(file)))
        else:
            rows = _read_json(file)
    except OSError as error:
        raise GradvarError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise GradvarError(f"{file}: the file is empty; expected at least one row")
    return rows


def plain(value: Any) -> Any:
    """Returns a value as JSON would hold it: tuples become lists, NaN becomes None, unknown types their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def _listed(suffixes: tuple[str, ...]) -> str:
    return ", ".join(suffixes[:-1]) + f" or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise GradvarError(
            f"{file}, line {line}: expected UTF-8, received the byte 0x{data[error.start]:02x}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise GradvarError(f"{file}, line {line}: expected text, received a NUL byte; save the file as UTF-8")
    return text


def _read_json(file: Path) -> list[Any]:
    text = _read_text(file)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if _starts_with_object_line(text):
            return list(_parse_lines(file, text))
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise GradvarError(f"{file}, line {line}: broken JSON: {reason}") from error
    if isinstance(content, dict) and _starts_with_object_line(text):
        content = [content]
    if not isinstance(content, list):
        raise GradvarError(f"{file}: expected a JSON list of rows, received {_kind(content)}")
    return [plain(row) for row in content]


def _starts_with_object_line(text: str) -> bool:
    first = next(line for line in text.splitlines() if line.strip())
    try:
        return isinstance(json.loads(first), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _parse_lines(file: Path, text: str) -> Iterator[dict[str, Any]]:
    # Not splitlines(): U+2028 and its like may stand unescaped inside JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise GradvarError(f"{file}, line {number}: broken JSON: {error.msg}") from error
        except RecursionError as error:
            raise GradvarError(f"{file}, line {number}: broken JSON: nested too deeply") from error
        if not isinstance(row, dict):
            raise GradvarError(f"{file}, line {number}: expected a JSON object, received {_kind(row)}")
        yield plain(row)


def _read_csv(file: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = list(reader.fieldnames or ())
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise GradvarError(f"{file}, line 1: expected different names of columns, received {repeated!r} twice")
        for row in reader:
            if None in row or None in row.values():
                raise GradvarError(
                    f"{file}, line {reader.line_num}: expected {len(names)} cells, "
                    f"received {'more' if None in row else 'fewer'}"
                )
            rows.append({str(key): (value if value != "" else None) for key, value in row.items()})
    except csv.Error as error:
        raise GradvarError(f"{file}, line {reader.reader.line_num}: broken csv: {error}") from error
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise GradvarError(f"{file}: expected a parquet file, and reading it failed: {reason}") from error
    return [plain(row) for row in table.to_pylist()]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
