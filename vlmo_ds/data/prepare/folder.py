"""Folders of pictures, with a .txt, .caption or .json of the same name beside each, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vlmo_ds.data.index import ShardIndex
from vlmo_ds.data.prepare.pictures import ENDINGS, bytes_of, content_id, id_of
from vlmo_ds.data.prepare.sources import need, pair, sample_json, usable_image
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.shards import RawSample, Shard
from vlmo_ds.data.storage import DataError, Storage

BESIDE = ("txt", "caption", "json")


def folder(root: Path, resize: int) -> Plan:
    """One sample for each picture in a folder and the folders in it.

    Where no picture has a text beside it they are written without one (masked image modelling needs none); where some
    have, those that have none are left out.
    """
    items = list(pictures_below(need(root, "a folder of pictures")))
    if not items:
        raise DataError(f"{root} holds no pictures; accepted: {', '.join(ENDINGS)}, in it or in folders in it")
    captioned = any(beside for _, beside in items)
    return Plan(root.resolve().name or "pictures", items, partial(make, root=root, captioned=captioned, resize=resize))


def pictures_below(root: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(path below root, extensions of the texts beside it) of every picture; hidden files are none."""
    seen: set[str] = set()
    for at, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = set(files)
        for name in sorted(files):
            stem, ending = os.path.splitext(name)
            if ending.lower() in ENDINGS and not name.startswith("."):
                beside = tuple(kind for kind in BESIDE if f"{stem}.{kind}" in names)
                yield os.path.relpath(os.path.join(at, name), root), beside


def make(item: tuple, root: Path, captioned: bool, resize: int) -> Made:
    path, beside = item
    data = bytes_of(root / path)
    if isinstance(data, Rejected):
        yield data
    elif captioned:
        yield from with_texts(data, path, beside, root, resize)
    else:
        image = usable_image(data, resize)
        if isinstance(image, Rejected):
            yield image
        else:
            yield Sample({image[0]: image[1], "json": sample_json(file=path)}, 0)


def with_texts(data: bytes, path: str, beside: tuple[str, ...], root: Path, resize: int) -> Made:
    """What lies beside the picture is read as the members of a sample are."""
    if not beside:
        yield Rejected("no .txt or .json beside it")
        return
    stem = os.path.splitext(path)[0]
    try:
        fields = {kind: (root / f"{stem}.{kind}").read_bytes() for kind in beside}
    except OSError:
        yield Rejected("text beside it cannot be read")
        return
    raw = RawSample(Shard(str(root), ShardIndex(0), Storage()), stem, fields)
    try:
        captions = raw.captions
        given = id_of(raw.meta.get("image_id"))
        kept = {key: raw.meta[key] for key in ("url", "sha256") if isinstance(raw.meta.get(key), str)}
    except DataError as error:
        yield Rejected(str(error).replace(raw.name, "").lstrip(": "))
        return
    yield from pair(data, captions, resize, file=path, image_id=content_id(data) if given is None else given, **kept)
