"""Tables of pictures and captions: csv, tsv, jsonl, JSON arrays and parquet, of which a shard's rows are read at a time."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vlmo_ds.data.prepare.pictures import content_id, id_of, picture_of, texts_of
from vlmo_ds.data.prepare.sources import pair
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected
from vlmo_ds.data.storage import DataError, Storage, is_remote

MOST_LINE = 16 << 20  # bytes; more in one line, or between two quotes, is no table of captions
MOST_ARRAY = 512 << 20  # bytes of a JSON array, which is held in memory to find its rows
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}  # the first under which the columns are found
JSON_KINDS = (".json", ".jsonl", ".ndjson")  # one object a line, or one array of objects: the contents decide
KINDS = (*DELIMITERS, *JSON_KINDS, ".parquet")
ARRAY, SPACE = ".json", re.compile(r"[ \t\n\r]*")
csv.field_size_limit(MOST_LINE)

Row = dict[str, Any] | Rejected


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read. names: all columns of a csv or tsv that has no line with them."""

    image: str
    caption: str
    image_id: str | None = None
    names: tuple[str, ...] = ()
    quotes: bool = True  # of csv and tsv: whether cells stand in quotes where they need to

    @property
    def needed(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.image_id) if name is not None]


@dataclass(frozen=True)
class Part:
    """Some rows of a table: between two offsets in bytes, of parquet between two numbers of rows.

    kind: .csv, .tsv, .parquet, .jsonl for one object a line, .json for an array of them.
    """

    path: str
    kind: str
    first: int
    last: int
    header: tuple[str, ...] = ()  # of csv and tsv
    delimiter: str = ""


def table(inputs: Sequence[str], columns: Columns, root: str | None, resize: int, samples: int) -> Plan:
    """One sample for each row: an image (a path, an http(s) URL, or in parquet its bytes) with its caption.

    root: what paths are relative to, a folder or URL; None: the table's own. Rows with the same image id, or without
    one with the same bytes, show the same picture: none of them is another's wrong caption.
    """
    items = []
    for name in inputs:
        base = root or (name.rpartition("/")[0] if is_remote(name) else str(Path(name).parent))
        items += [(part, base) for part in parts_of(name, columns, samples)]
    return Plan("table", items, partial(make, columns=columns, resize=resize), items_per_shard=1)


def parts_of(name: str, columns: Columns, samples: int) -> Iterable[Part]:
    kind = Path(name).suffix.lower()
    if kind not in KINDS:
        raise DataError(f"{name}: a table is one of {', '.join(KINDS)}")
    path = str(Storage().local(name)) if is_remote(name) else name
    if not Path(path).is_file():
        raise DataError(f"{name} does not exist: expected a table")
    if kind == ".parquet":
        from vlmo_ds.data.prepare import arrow

        check_columns(name, arrow.columns_of(path), columns)
        rows = arrow.count_of(path)
        return [Part(path, kind, n, min(n + samples, rows)) for n in range(0, rows, samples)]
    if kind in DELIMITERS:
        return list(csv_parts(path, kind, columns, samples))
    return list((array_parts if is_array(path) else json_parts)(path, columns, samples))


def check_columns(name: str, found: Iterable[str], columns: Columns) -> None:
    found = list(found)
    if missing := [column for column in columns.needed if column not in found]:
        raise DataError(
            f"{name} has no column {missing[0]!r}; it has {', '.join(map(repr, found[:20]))}: name them with --image, "
            "--caption and --image_id, or with --columns where the first line holds no names"
        )


def cut(ends: Iterable[int], start: int, samples: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every so many rows, from the offsets behind each."""
    end = start
    for number, end in enumerate(ends, 1):
        if number % samples == 0:
            yield start, end
            start = end
    if end > start:
        yield start, end


def lines_of(file: BinaryIO, last: int, passed: Callable[[int], None]) -> Iterator[str]:
    """Lines up to an offset; `passed` is told the offset behind each. Bytes that are not UTF-8 become surrogates."""
    at = file.tell()
    while at < last and (line := file.readline(MOST_LINE)):
        if len(line) == MOST_LINE:
            raise DataError(f"{file.name}: more than {MOST_LINE >> 20} MB without the end of a line at byte {at}")
        at += len(line)
        passed(at)
        yield line.decode("utf-8", "surrogateescape")


# ---- csv and tsv ----


def csv_rows(part: Part, quotes: bool, strict: bool = False) -> Iterator[tuple[list[str], int]]:
    """(cells, offset behind them) of each row."""
    offsets = [part.first]
    with open(part.path, "rb") as file:
        file.seek(part.first)
        lines = lines_of(file, part.last, lambda at: offsets.__setitem__(0, at))
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        try:
            for cells in csv.reader(lines, delimiter=part.delimiter, quoting=quoting, strict=strict):
                if cells:
                    yield cells, offsets[0]
        except csv.Error as error:
            raise DataError(
                f"{part.path}: the quotes of a row before byte {offsets[0]} do not fit ({error}); cells whose quotes are "
                "text like any other are read with --no_quotes"
            ) from None


def csv_parts(path: str, kind: str, columns: Columns, samples: int) -> Iterable[Part]:
    whole = with_header(path, kind, columns)
    start = before_last = whole.first

    def ends() -> Iterator[int]:
        nonlocal start, before_last
        for _, end in csv_rows(whole, columns.quotes):
            before_last, start = start, end
            yield end

    parts = list(cut(ends(), whole.first, samples))
    for _ in csv_rows(replace(whole, first=before_last), columns.quotes, strict=True):
        pass  # a quote that is not closed makes one row of all the rest: an error in strict reading alone
    return (replace(whole, first=first, last=last) for first, last in parts)


def with_header(path: str, kind: str, columns: Columns) -> Part:
    """The rows of a csv or tsv, with the names of its columns."""
    with open(path, "rb") as file:
        beginning = file.read(3)
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    mark, size = (3 if beginning == b"\xef\xbb\xbf" else 0), Path(path).stat().st_size
    found = []
    for delimiter in DELIMITERS[kind]:
        whole = Part(path, kind, mark, size, columns.names, delimiter)
        cells, start = next(csv_rows(whole, columns.quotes), ([], size))
        if not columns.names:
            whole = replace(whole, first=start, header=tuple(cell.strip() for cell in cells))
        found.append(whole)
        if len(whole.header) == len(cells) and set(columns.needed) <= set(whole.header):
            break
    else:
        whole = found[0]
    check_columns(path, whole.header, columns)
    if twice := [name for name in columns.needed if whole.header.count(name) > 1]:
        raise DataError(f"{path} has two columns {twice[0]!r}")
    return whole


def read_csv(part: Part, quotes: bool) -> Iterator[Row]:
    for cells, _ in csv_rows(part, quotes):
        if len(cells) != len(part.header):
            yield Rejected("row with more or fewer cells than columns")
        elif not all(map(is_utf8, cells)):
            yield Rejected("row that is not UTF-8")
        else:
            yield dict(zip(part.header, cells, strict=True))


def is_utf8(text: str) -> bool:
    """Whether nothing in it was decoded to half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- jsonl ----


def json_parts(path: str, columns: Columns, samples: int) -> Iterator[Part]:
    offsets: list[int] = [0]
    size = Path(path).stat().st_size

    def ends() -> Iterator[int]:
        with open(path, "rb") as file:
            for _ in lines_of(file, size, lambda at: offsets.__setitem__(0, at)):
                yield offsets[0]

    first = next(read_json(Part(path, ".jsonl", 0, size)), None)
    if not isinstance(first, dict):
        raise DataError(f"{path}: its first line is no JSON object; expected one a line, or an array of them")
    check_columns(path, first, columns)
    for start, end in cut(ends(), 0, samples):
        yield Part(path, ".jsonl", start, end)


def read_json(part: Part) -> Iterator[Row]:
    with open(part.path, "rb") as file:
        file.seek(part.first)
        for line in lines_of(file, part.last, lambda at: None):
            line = line.removeprefix("\ufeff")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not is_utf8(line):
                yield Rejected("row that is not UTF-8")
            else:
                yield row if isinstance(row, dict) else Rejected("line that is no JSON object")


# ---- JSON arrays ----


def is_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def array_rows(text: str) -> Iterator[tuple[Any, int, int]]:
    """(value, start, end) of each entry of a JSON array that begins at the first bracket. ValueError where it is none."""
    decoder = json.JSONDecoder()
    at, sign = text.index("["), ""
    while sign != "]":
        at = after_space(text, at + 1)
        if not sign and text[at : at + 1] == "]":  # an empty one
            break
        value, end = decoder.raw_decode(text, at)
        yield value, at, end
        at = after_space(text, end)
        sign = text[at : at + 1]
        if sign not in (",", "]"):
            raise json.JSONDecodeError("expected ',' or ']'", text, at)
    if text[at + 1 :].strip(" \t\n\r"):
        raise json.JSONDecodeError("expected nothing more", text, at + 1)


def array_parts(path: str, columns: Columns, samples: int) -> Iterator[Part]:
    if (size := Path(path).stat().st_size) > MOST_ARRAY:
        raise DataError(
            f"{path}: a JSON array of {size >> 20} MB; accepted: up to {MOST_ARRAY >> 20} MB, or any size with one object a line (jsonl)"
        )
    text = Path(path).read_bytes().decode("latin-1")  # a byte is a character: places in one are places in the other
    try:
        _, start, end = next(array_rows(text), (None, 0, 0))
        first = json.loads(text[start:end].encode("latin-1").decode("utf-8", "replace") or "null")
        if isinstance(first, dict):
            check_columns(path, first, columns)
            ends = (end for _, _, end in array_rows(text))
            yield from (Part(path, ARRAY, *span) for span in cut(ends, text.index("[") + 1, samples))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no whole JSON array ({error})") from None
    if not isinstance(first, dict):
        raise DataError(f"{path}: the first entry of its array is no JSON object; expected an array of objects")


def read_array(part: Part) -> Iterator[Row]:
    with open(part.path, "rb") as file:
        file.seek(part.first)
        rows = file.read(part.last - part.first).decode("utf-8", "surrogateescape")
    text = "[" + rows.lstrip(", \t\n\r") + "]"
    try:
        for row, start, end in array_rows(text):
            if not is_utf8(text[start:end]):
                yield Rejected("row that is not UTF-8")
            else:
                yield row if isinstance(row, dict) else Rejected("entry that is no JSON object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{part.path} has changed while it was read ({error})") from None


# ---- samples ----


def rows_of(part: Part, columns: Columns) -> Iterator[Row]:
    if part.kind == ".parquet":
        from vlmo_ds.data.prepare import arrow

        return arrow.read_rows(part.path, part.first, part.last, columns.needed)
    if part.kind in DELIMITERS:
        return read_csv(part, columns.quotes)
    return read_array(part) if part.kind == ARRAY else read_json(part)


def make(item: tuple[Part, str], columns: Columns, resize: int) -> Made:
    part, base = item
    for row in rows_of(part, columns):
        if isinstance(row, Rejected):
            yield row
        else:
            yield from make_pair(row, columns, base, resize)


def make_pair(row: dict[str, Any], columns: Columns, base: str, resize: int) -> Made:
    """The image and the captions of a row."""
    image, captions = row.get(columns.image), texts_of(row.get(columns.caption))
    if not captions:
        yield Rejected("no caption")
        return
    data = picture_of(image, base)
    if isinstance(data, Rejected):
        yield data
        return
    given = id_of(row.get(columns.image_id)) if columns.image_id else None
    path = image.get("path") if isinstance(image, dict) else image
    yield from pair(
        data,
        captions,
        resize,
        image_id=content_id(data) if given is None else given,
        **({"file": path} if isinstance(path, str) else {}),
    )
