"""Rows of the pyarrow files that ViLT's and VLMo's scripts write, read without loading the file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from vlmo_ds.data.storage import DataError

try:
    import pyarrow as pa
except ImportError:
    raise DataError("`prepare arrow` needs pyarrow: pip install 'vlmo_ds[arrow]'") from None

ACCEPTED = ({"image", "caption"}, {"image", "questions"}, {"image_0", "image_1", "questions", "answers"}, {"caption"})


@lru_cache(maxsize=8)
def open_table(path: str) -> pa.Table:
    """A memory-mapped table whose columns are those of one of the known datasets."""
    try:
        table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    except pa.ArrowInvalid:
        try:
            table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not a pyarrow file ({error})") from None
    if not any(columns <= set(table.column_names) for columns in ACCEPTED):
        accepted = "; ".join(", ".join(sorted(columns)) for columns in ACCEPTED)
        raise DataError(f"{path} has the columns {', '.join(table.column_names)}; accepted: {accepted}")
    return table


def read_rows(path: str, first: int, last: int) -> Iterator[dict[str, Any]]:
    for row in range(first, last):
        yield open_table(path).slice(row, 1).to_pylist()[0]
