"""Shards: WebDataset tars (`key.jpg`, `key.txt`, `key.json`), read sample by sample with the help of their index."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vlmo_ds.data.index import (
    BLOCK,
    IMAGE_EXTENSIONS,
    INDEX,
    MOST_SAMPLES,
    TAR_ERRORS,
    ShardIndex,
    members,
    parse_index,
    scan_shard,
    unpack,
    unpack_spans,
)
from vlmo_ds.data.meta import is_label, is_unicode, parse_json, printable, read_meta, shown, truth
from vlmo_ds.data.storage import DataError, NoAccess, Storage, expand, is_remote, read_span

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Shard:
    """One tar: its path or URL, what its index says, and how to get it."""

    url: str
    index: ShardIndex
    storage: Storage
    known_as: str = ""  # the name that sample ids are made of, where the shard has moved since a run began

    @property
    def samples(self) -> int:
        return self.index.samples

    @cached_property
    def name(self) -> str:
        """The last three parts of the path: coco/train/000.tar is not cc3m/train/000.tar, on whatever disk they are."""
        if self.known_as:
            return self.known_as
        path = urlsplit(self.url).path if is_remote(self.url) else str(Path(self.url).resolve())
        return "/".join(Path(path).parts[-3:])

    @property
    def text_lengths(self) -> np.ndarray:
        """[samples] bytes of text, as far as the index knows."""
        if not self.index.lengths:
            return np.zeros(self.samples, dtype=np.uint16)
        try:
            return unpacked_lengths(self.index.lengths, self.samples)
        except DataError as error:
            raise DataError(f"shard {self.url}: {error}") from None

    def read(self, row: int) -> RawSample:
        """One sample, its .json checked. DataError where the shard or this part of it cannot be read or used."""
        path = self.storage.local(self.url, self.index.bytes if self.index.bytes >= 0 else None)
        spans = offsets(self)
        if row >= len(spans) - 1:
            raise DataError(f"shard {self.url} holds {len(spans) - 1} samples, its index says {self.samples}")
        start, end = int(spans[row]), int(spans[row + 1])
        data = read_span(path, start, end - start)
        key = ""
        fields: dict[str, bytes] = {}
        try:
            for member_key, extension, info, tar in members(io.BytesIO(data)):
                if fields and member_key != key:
                    raise DataError(f"shard {self.url} does not fit its index at sample {row}: build the index again")
                if not is_unicode(info.name):
                    raise DataError(
                        f"{self.url}: the name of a file in sample {row} is not UTF-8: {printable(info.name)}"
                    )
                if extension in fields:
                    raise DataError(f"{self.url}:{member_key} has two members .{extension}")
                if info.size > len(data):  # of a sparse file, or a damaged header
                    raise DataError(f"shard {self.url} is damaged at sample {row}: {info.name} has {info.size} bytes")
                key, fields[extension] = member_key, tar.extractfile(info).read()  # type: ignore[union-attr]  # a file
        except DataError:
            raise
        except TAR_ERRORS as error:
            raise DataError(f"shard {self.url} is damaged at sample {row}: {error}") from None
        if not fields:
            raise DataError(f"shard {self.url} does not fit its index at sample {row}: build the index again")
        raw = RawSample(self, key, fields)
        _ = raw.meta  # checked here, for every reader
        return raw


@lru_cache(maxsize=512)
def unpacked(packed: str, samples: int) -> np.ndarray:
    return unpack_spans(packed, samples)


@lru_cache(maxsize=512)
def unpacked_lengths(packed: str, samples: int) -> np.ndarray:
    return unpack(packed, np.uint16, samples)


@lru_cache(maxsize=100_000)
def scan_once(path: str, changed: int) -> tuple[ShardIndex, str]:
    return scan_shard(path, Storage())


@lru_cache(maxsize=512)
def scanned(path: Path) -> np.ndarray:
    """Offsets of a shard whose index has only the number of samples."""
    spans = scan_shard(str(path), Storage())[0].spans()
    return np.zeros(1, dtype=np.int64) if spans is None else spans


def offsets(shard: Shard) -> np.ndarray:
    if shard.index.offsets:
        try:
            return unpacked(shard.index.offsets, shard.samples)
        except DataError as error:
            raise DataError(f"shard {shard.url}: {error}") from None
    return scanned(shard.storage.local(shard.url))


def list_shards(patterns: Sequence[str], storage: Storage | None = None, index: str | None = None) -> list[Shard]:
    """The shards that the patterns name. index: an index file instead of those beside the shards.

    Local shards that no index knows are scanned; for remote ones an index has to be built.
    """
    storage = storage or Storage()
    if index and not read_index(index, storage):
        raise DataError(f"data.index: {index} does not exist or names no shard")
    urls = expand(patterns)
    if index:
        check_names(urls, index, storage)
    shards = []
    for url in urls:
        if not is_unicode(url):
            raise DataError(f"shards: the name of {printable(url)} is not UTF-8: rename it")
        folder, _, name = url.rpartition("/")
        known = read_index(index or f"{folder or '.'}/{INDEX}", storage).get(name)
        if known is None and is_remote(url):
            raise DataError(
                f"shards: there is no index for {url}: build one with "
                f"`python -m vlmo_ds.data.index '{patterns[0]}' --output FILE` and name it in the recipe (data.index)"
            )
        if known is None:
            known, problem = scan_once(url, Path(url).stat().st_mtime_ns)
            if known.samples == 0:
                raise DataError(f"shards: {url}: {problem}; expected members such as 000001.jpg and 000001.txt")
        elif not is_remote(url):
            check_size(url, known)
        size = known.bytes if is_remote(url) else Path(url).stat().st_size
        if not 0 <= known.samples <= (size // BLOCK if size >= 0 else MOST_SAMPLES):
            raise DataError(
                f"shards: the index says {known.samples} samples in the {size} bytes of {url}: delete it, and build it again"
            )
        if known.samples == 0:
            raise DataError(f"shards: {url} holds no samples; expected members such as 000001.jpg and 000001.txt")
        shards.append(Shard(url, known, storage))
    return shards


def check_names(urls: Iterable[str], index: str, storage: Storage) -> None:
    """DataError for shards of one name in different folders: an index knows shards by their names alone."""
    names = read_index(index, storage)
    seen: dict[str, tuple[str, str]] = {}
    for url in urls:
        name, place = url.rpartition("/")[2], url if is_remote(url) else str(Path(url).resolve())
        first, where = seen.setdefault(name, (url, place))
        if name in names and where != place:
            raise DataError(
                f"data.index: {index} has one entry {name} for {printable(first)} and {printable(url)}: give each folder "
                "an index of its own, as a source of its own (data.sources)"
            )


def check_size(url: str, known: ShardIndex) -> None:
    """Warns of a truncated shard, whose last samples will be replaced; an index of another file is an error."""
    size = Path(url).stat().st_size
    if known.bytes < 0 or size == known.bytes:
        return
    if size > known.bytes:
        raise DataError(
            f"shards: {url} has {size} bytes, its index says {known.bytes}: "
            f"build the index again with `python -m vlmo_ds.data.index {Path(url).parent}`"
        )
    warnings.warn(f"shard {url} is truncated: it has {size} bytes, its index says {known.bytes}", stacklevel=2)


@lru_cache(maxsize=256)
def read_index(url: str, storage: Storage) -> dict[str, ShardIndex]:
    """Shard name -> index, as the file says; nothing where there is no such file."""
    if is_remote(url):
        try:
            content = storage.read(url)
        except NoAccess:
            raise
        except DataError:
            return {}
        return parse_index(content, url)
    return parse_index(Path(url).read_bytes(), url) if Path(url).is_file() else {}


@dataclass
class RawSample:
    """One sample as stored."""

    shard: Shard
    key: str
    fields: dict[str, bytes]

    @property
    def name(self) -> str:
        return f"{self.shard.url}:{self.key}"

    @property
    def image(self) -> bytes:
        return self.picture("")

    def picture(self, prefix: str) -> bytes:
        """The image in a member whose extension begins so, as "0." in a sample of two images (NLVR2)."""
        accepted = [prefix + extension for extension in IMAGE_EXTENSIONS]
        for extension in accepted:
            if extension in self.fields:
                return self.fields[extension]
        raise DataError(f"{self.name} has no image; found .{', .'.join(self.fields)}, accepted .{', .'.join(accepted)}")

    def entries(self, key: str, needed: Sequence[str]) -> list[dict]:
        """What .json lists under a key ("questions" of VQA, "sentences" of NLVR2), each with the fields needed."""
        found = self.meta.get(key)
        if not found:
            raise DataError(f"{self.name}: its .json lists no '{key}'; prepare the shards with vlmo_ds.data.prepare")
        for entry in found:
            if missing := [field for field in needed if field not in entry]:
                raise DataError(f"{self.name}: one of its {key} has no '{missing[0]}'; found {', '.join(entry)}")
        return found

    @property
    def captions(self) -> list[str]:
        """All texts of the sample: the lines of .txt, or `caption(s)` of .json."""
        if "txt" in self.fields or "caption" in self.fields:
            texts = lines(self.fields.get("txt", self.fields.get("caption", b"")).decode("utf-8-sig", "replace"))
        else:
            found = self.meta.get("captions", self.meta.get("caption", []))
            texts = [found] if isinstance(found, str) else found
        texts = clean_texts(texts)
        if not texts:
            raise DataError(f"{self.name} has an empty caption; expected text in .txt, or 'caption(s)' in .json")
        return texts

    @property
    def asked(self) -> list[str]:
        """The questions or sentences of a fine-tuning set."""
        fields = (("questions", "question"), ("sentences", "sentence"))
        return [entry.get(field, "") for key, field in fields for entry in self.meta.get(key, [])]

    @property
    def answers(self) -> list[str]:
        """Those of the questions' annotators, each once for a question."""
        return clean_texts(
            answer for entry in self.meta.get("questions", []) for answer in dict.fromkeys(entry.get("answers", []))
        )

    @property
    def texts(self) -> list[str]:
        """Questions, sentences or captions: whatever text the sample has."""
        return clean_texts(self.asked) or self.captions

    @cached_property
    def meta(self) -> dict[str, Any]:
        """.json as vlmo_ds.data.meta checks it; empty where there is none."""
        if "json" not in self.fields:
            return {}
        try:
            return read_meta(self.fields["json"])
        except ValueError as error:
            raise DataError(f"{self.name}: its .json {error}") from None

    @property
    def label(self) -> Any:
        """The number of the picture's class: "label" of .json, or what .cls holds; None where there is neither."""
        if "label" in self.meta or "cls" not in self.fields:
            return self.meta.get("label")
        text = self.fields["cls"].decode("utf-8", "replace").strip()
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else text

    def label_below(self, classes: int) -> int:
        """The label. DataError where it is none of so many classes."""
        label = self.label
        if is_label(label) and label < classes:
            return label
        raise DataError(
            f"{self.name}: its label in .json or .cls is {shown(label)}; accepted: a number from 0 to {classes - 1} (model.num_classes)"
        )

    @property
    def sample_id(self) -> int:
        """A hash of the key and the shard's name."""
        return stable_id(f"{self.shard.name}:{self.key}")

    @property
    def image_id(self) -> int:
        """`image_id` of .json: samples that show the same picture have the same one. Without it, the sample's own."""
        found = self.meta.get("image_id")
        if found is None:
            return self.sample_id
        return found if isinstance(found, int) else stable_id(found)


def answer_list(urls: Iterable[str], storage: Storage | None = None) -> list[str]:
    """The answers that VQA's labels number: answers.json beside the shards, the same in all of their folders."""
    storage, found = storage or Storage(), {}
    for folder in dict.fromkeys(url.rpartition("/")[0] or "." for url in urls):
        file = f"{folder}/{ANSWERS}"
        try:
            content = storage.read(file) if is_remote(file) else Path(file).read_bytes()
        except (OSError, DataError) as error:
            raise DataError(f"{file}: the list of answers beside VQA's shards cannot be read ({error})") from None
        found[file] = parse_answers(content, file)
    (first, answers), *others = found.items()
    for file, other in others:
        if other != answers:
            raise DataError(f"{first} and {file} number the answers differently: prepare both with the same --least")
    return answers


def parse_answers(content: bytes, file: str | Path) -> list[str]:
    """The answers in an answers.json. DataError naming the file."""
    try:
        answers = parse_json(content)
    except ValueError as error:
        raise DataError(f"{file}, the list of VQA's answers, {error}") from None
    if not answers or not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{file} holds no list of answers")
    return answers


def is_true(label: object) -> bool:
    """A label of NLVR, which writes "true" or "True"."""
    return bool(truth(label))


def lines(text: str) -> list[str]:
    """The lines of a text, which end at newlines alone: str.splitlines ends them at nine other characters as well."""
    return re.split(r"\r\n|\n|\r", text)


def clean_texts(texts: Iterable[str]) -> list[str]:
    """Texts with single spaces and no NULs; empty ones are left out."""
    found = (" ".join(text.replace("\0", " ").split()) for text in texts)
    return [text for text in found if text]


def stable_id(name: str) -> int:
    """A positive int64 that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
