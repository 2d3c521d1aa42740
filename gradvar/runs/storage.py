"""Files that land whole or not at all, and reading them back with damage named."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as encode_safetensors

from gradvar.errors import GradvarError

PARTIAL_SUFFIX = ".partial"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file beside its final name, then rename it: readers see all of it or none.

    Raises:
        GradvarError: The disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise GradvarError(
            f"cannot write {path}: {reason}; make room or choose a folder you may write to, then run the same "
            "command again (what was finished is kept)"
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes whole or not at all."""
    write_whole(path, lambda partial: _write_bytes(partial, content))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, keys in the order given."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read one JSON document.

    Raises:
        GradvarError: The file is missing, unreadable or damaged.
    """
    with _readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> None:
    """Write a parquet file of the given columns and Arrow schema (deterministic for equal content)."""
    arrays = [pa.array(columns[name], type=schema.field(name).type) for name in schema.names]
    table = pa.Table.from_arrays(arrays, schema=schema)
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def read_columns(path: Path, schema: pa.Schema) -> dict[str, list[Any]]:
    """Read a parquet file that `write_table` made, as plain Python lists.

    Raises:
        GradvarError: The file is missing, damaged, or lacks a column.
    """
    with _readable(path):
        table = pq.read_table(path)
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise damaged(path, f"no column {missing[0]!r}")
    return {name: table.column(name).to_pylist() for name in schema.names}


def read_label(path: Path) -> dict[str, str]:
    """Read the text metadata of a parquet file's schema.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    with _readable(path):
        metadata = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a tidy pandas table as parquet."""
    write_whole(path, lambda partial: frame.to_parquet(partial, index=False, engine="pyarrow"))


def read_frame(path: Path) -> pd.DataFrame:
    """Read a tidy pandas table.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    with _readable(path):
        return pd.read_parquet(path, engine="pyarrow")


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write named arrays and text metadata as safetensors."""
    content = encode_safetensors({name: np.ascontiguousarray(a) for name, a in arrays.items()}, dict(metadata))
    write_bytes(path, content)


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read named arrays and their metadata.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    with _readable(path), safe_open(path, framework="numpy") as handle:
        arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
        return arrays, dict(handle.metadata() or {})


def read_arrays_label(path: Path) -> dict[str, str]:
    """Read the text metadata of a safetensors file, without its arrays.

    Raises:
        GradvarError: The file is missing or damaged.
    """
    with _readable(path), safe_open(path, framework="numpy") as handle:
        return dict(handle.metadata() or {})


def damaged(path: Path, why: str) -> GradvarError:
    """Return the error for a file of the run that does not hold what it should."""
    return GradvarError(f"damaged file {path}: {why}; delete it and run the stage that makes it again")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise GradvarError(f"missing file {path}: run the stage that makes it") from None
    except PermissionError as error:
        raise GradvarError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, pa.ArrowException, SafetensorError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise damaged(path, first_line) from error
