"""Rows of arrow and parquet files, read without loading the file: those of ViLT's and VLMo's scripts, and those of
Hugging Face datasets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlmo_ds.data.prepare.pictures import picture_of, texts_of
from vlmo_ds.data.prepare.sources import need, read_json, sample_json, shaped, usable_image, write_text
from vlmo_ds.data.prepare.table import Columns, make_pair
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.storage import DataError

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    raise DataError("arrow and parquet files need pyarrow: pip install 'vlmo_ds[arrow]'") from None

IMAGES, CAPTIONS = ("image", "img"), ("caption", "captions", "text")  # columns that are known without being named
ACCEPTED = "caption, image; image, questions; image_0, image_1, questions, answers; caption; image"
BATCH = 64  # rows of parquet that are in memory at a time
PART = re.compile(r"-\d{5}-of-\d{5}.*$")  # of a name: which part of a split a file is


def arrow(
    inputs: Sequence[Path],
    image: str | None,
    caption: str | None,
    image_id: str,
    split: str | None,
    resize: int,
    samples: int,
) -> Plan:
    """Arrow and parquet files: captions, VQAv2, NLVR2, classes or text alone, by their columns.

    image, caption: names of columns; None: those of ViLT's scripts and of most datasets.
    """
    items = []
    for file in (str(file) for path in inputs for file in files_of(need(path, "an arrow file or a dataset"), split)):
        layout = layout_of(file, image, caption, image_id)
        rows = count_of(file)
        items += [(file, layout, first, min(first + samples, rows)) for first in range(0, rows, samples)]
    return Plan("arrow", items, partial(make, resize=resize), items_per_shard=1)


@dataclass(frozen=True)
class Layout:
    """What is made of a row: pairs, questions, captions, pictures or text; and of which columns."""

    kind: str
    image: str = ""
    caption: str = ""
    image_id: str = ""
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def layout_of(path: str, image: str | None, caption: str | None, image_id: str) -> Layout:
    """DataError for columns that are not known, or not there."""
    names = columns_of(path)
    for given in (image, caption):
        if given is not None and given not in names:
            raise DataError(f"{path} has no column '{given}'; it has {', '.join(names)}")
    if not (image or caption):
        if {"image_0", "image_1", "questions", "answers"} <= set(names):
            return Layout("pairs", columns=("image_0", "image_1", "questions", "answers", "identifier"))
        if {"image", "questions"} <= set(names):
            return Layout("questions", "image")
    image = image or next((name for name in IMAGES if name in names), "")
    caption = caption or next((name for name in CAPTIONS if name in names), "")
    if not image and not caption:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; accepted: {ACCEPTED}; name them with --image and --caption where they "
            "are called otherwise"
        )
    if image and not caption:
        return Layout("pictures", image, columns=(image, "label"), classes=tuple(label_names(path, "label")))
    return Layout("captions" if image else "text", image, caption, image_id, (image, caption, image_id))


def make(item: tuple[str, Layout, int, int], resize: int) -> Made:
    path, layout, first, last = item
    makers = {"pairs": make_pairs, "questions": make_questions, "captions": make_captions, "pictures": make_picture}
    folder = str(Path(path).parent)
    names = [name for name in columns_of(path) if not layout.columns or name in layout.columns]
    for row in read_rows(path, first, last, names):
        try:
            if layout.kind == "text":
                yield from list(write_text(texts_of(row[layout.caption])))
            else:
                yield from list(makers[layout.kind](row, layout, folder, resize))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield Rejected(f"row that cannot be used: {type(error).__name__}: {error!s:.80}")


def make_captions(row: dict, layout: Layout, folder: str, resize: int) -> Made:
    return make_pair(row, Columns(layout.image, layout.caption, layout.image_id), folder, resize)


def make_picture(row: dict, layout: Layout, folder: str, resize: int) -> Made:
    """A picture with its class, where it has one."""
    image = encoded(row[layout.image], folder, resize)
    if isinstance(image, Rejected):
        yield image
        return
    label = row.get("label")
    meta: dict[str, Any] = {}
    if type(label) is int and label >= 0:
        meta["label"] = label
        if label < len(layout.classes):
            meta["class"] = layout.classes[label]
    yield Sample({image[0]: image[1], "json": sample_json(**meta)}, 0)


def make_questions(row: dict, layout: Layout, folder: str, resize: int) -> Made:
    """A picture with its questions: the columns of ViLT's write_vqa.py."""
    image = encoded(row[layout.image], folder, resize)
    if isinstance(image, Rejected):
        yield image
        return
    columns = {
        "question": "questions",
        "question_id": "question_id",
        "labels": "answer_labels",
        "scores": "answer_scores",
    }
    present = {ours: row[theirs] for ours, theirs in columns.items() if row.get(theirs)}
    questions = [dict(zip(present, values, strict=True)) for values in zip(*present.values(), strict=True)]
    yield Sample(
        {image[0]: image[1], "json": sample_json(image_id=row["image_id"], questions=questions)}, len(questions)
    )


def make_pairs(row: dict, layout: Layout, folder: str, resize: int) -> Made:
    """Two pictures with their sentences: the columns of ViLT's write_nlvr2.py, whose identifiers are those of pairs.

    A sentence's own identifier gets its number in the pair; sentence_id says which examples share a sentence, since
    the file no longer does: those of one set with the same words.
    """
    images = []
    for name in ("image_0", "image_1"):
        image = encoded(row[name], folder, resize)
        if isinstance(image, Rejected):
            yield image
            return
        images.append(image)
    pair_id = str(row["identifier"])
    set_id = pair_id.rpartition("-")[0] or pair_id
    sentences = [
        {"sentence": text, "label": label, "identifier": f"{pair_id}-{number}", "sentence_id": f"{set_id}:{text}"}
        for number, (text, label) in enumerate(zip(row["questions"], row["answers"], strict=True))
    ]
    fields = {f"{number}.{name}": data for number, (name, data) in enumerate(images)}
    yield Sample(fields | {"json": sample_json(image_id=f"nlvr2:{pair_id}", sentences=sentences)}, len(sentences))


def encoded(value: Any, folder: str, resize: int) -> tuple[str, bytes] | Rejected:
    data = picture_of(value, folder)
    return data if isinstance(data, Rejected) else usable_image(data, resize)


# ---- files and rows ----


def files_of(path: Path, split: str | None) -> list[Path]:
    """The data files that a path names: itself, or those of a Hugging Face dataset in a folder.

    Such a folder is written by save_to_disk (of one dataset, or of several splits), or is a cache or a download with
    data/SPLIT-00000-of-00004.parquet. DataError that lists the splits where one has to be chosen.
    """
    if not path.is_dir():
        return [path]
    saved = "what save_to_disk writes"
    if (file := path / "dataset_dict.json").is_file():
        with shaped(file, saved):
            sets = {str(name): path / str(name) for name in read_json(file, saved)["splits"]}
        return files_of(chosen(sets, split, path), None)
    if (file := path / "state.json").is_file():
        with shaped(file, saved):
            return [path / Path(entry["filename"]).name for entry in read_json(file, saved)["_data_files"]]
    found = sorted(path.glob("*.arrow")) or sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    files: dict[str, list[Path]] = {}
    for file in found:
        if not file.name.startswith("cache-"):  # what datasets' map() leaves
            files.setdefault(PART.sub("", file.stem), []).append(file)
    if not files:
        raise DataError(f"{path} holds no .arrow or .parquet files: expected a folder of Hugging Face datasets")
    return chosen(files, split, path)


def chosen(sets: dict[str, Any], split: str | None, path: Path) -> Any:
    matching = [name for name in sets if split in (None, name) or name.endswith(f"-{split}")]
    if len(matching) != 1:
        reason = f"--split {split} is not in it" if split else "it holds several sets: choose one with --split"
        raise DataError(f"{path}: {reason}; accepted: {', '.join(sets)}")
    return sets[matching[0]]


def columns_of(path: str) -> list[str]:
    return schema_of(path).names


def schema_of(path: str) -> pa.Schema:
    file = opened(path, os.getpid())
    return file.schema_arrow if isinstance(file, parquet.ParquetFile) else file.schema


def count_of(path: str) -> int:
    file = opened(path, os.getpid())
    return file.metadata.num_rows if isinstance(file, parquet.ParquetFile) else file.num_rows


@lru_cache(maxsize=8)
def opened(path: str, process: int) -> pa.Table | parquet.ParquetFile:
    """A memory-mapped table, or a parquet file. process: whose it is, since a file's place is not shared."""
    try:
        if path.endswith(".parquet"):
            return parquet.ParquetFile(path, pre_buffer=False)
        try:
            return pa.ipc.open_file(pa.memory_map(path)).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(pa.memory_map(path)).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a pyarrow file ({str(error)[:200]})") from None


def read_rows(path: str, first: int, last: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows first .. last - 1. columns: those that are read; None: all."""
    file = opened(path, os.getpid())
    try:
        if isinstance(file, parquet.ParquetFile):
            yield from parquet_rows(file, first, last, columns)
            return
        table = file.select(list(columns)) if columns else file
        for row in range(first, last):
            yield table.slice(row, 1).to_pylist()[0]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged between rows {first} and {last} ({str(error)[:200]})") from None


def parquet_rows(
    file: parquet.ParquetFile, first: int, last: int, columns: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    start = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        at = start
        start += rows
        if at + rows <= first or at >= last:
            continue
        wanted = list(columns) if columns else None
        for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted, use_threads=False):
            low, high = max(first, at), min(last, at + len(batch))
            if low < high:
                yield from batch.slice(low - at, high - low).to_pylist()
            at += len(batch)
            if at >= last:
                break


def label_names(path: str, column: str) -> list[str]:
    """The names of a Hugging Face dataset's classes; [] where it names none."""
    try:
        features = json.loads((schema_of(path).metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
