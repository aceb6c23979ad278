"""Shards: WebDataset tars (`key.jpg`, `key.txt`, `key.json`) with an index, read sample by sample.

An index.json beside the shards holds the number of samples of each; it is written last, so a folder without one is
either foreign (then it is counted) or unfinished (then it has a leftover .tmp file and is refused).
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

INDEX = "index.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "caption", "json")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what it holds and what is accepted."""


@dataclass(frozen=True)
class Shard:
    path: Path
    samples: int


@dataclass(frozen=True)
class Member:
    offset: int
    size: int


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name and renames: a reader sees the old file or the new one, never a half."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def expand(patterns: Sequence[str]) -> list[Path]:
    """Tar files from names, {000..009} ranges, * patterns and folders, in a fixed order."""
    paths: list[Path] = []
    for pattern in patterns:
        for name in braceexpand(pattern):
            path = Path(name)
            if path.is_dir():
                leftovers = sorted(path.glob("*.tmp"))
                if leftovers and not (path / INDEX).exists():
                    raise DataError(
                        f"shards: {path} is unfinished ({leftovers[0].name} is left in it and {INDEX} is missing): "
                        "run the prepare command that writes it again"
                    )
                found = sorted(path.glob("*.tar"))
            elif any(c in path.name for c in "*?["):
                found = sorted(path.parent.glob(path.name))
            else:
                found = [path] if path.is_file() else []
            if not found:
                kind = "holds no .tar file" if path.is_dir() else "does not exist"
                raise DataError(f"shards: {name} {kind}; expected WebDataset tars (see docs/data.md)")
            paths += found
    return paths


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """The shards that the patterns name, with their numbers of samples."""
    shards = []
    for path in expand(patterns):
        count = read_index(path.parent).get(path.name)
        if count is None:
            count = len(read_members(path))
        if count == 0:
            raise DataError(f"shards: {path} holds no samples; expected members such as 000001.jpg and 000001.txt")
        shards.append(Shard(path, count))
    return shards


@lru_cache(maxsize=256)
def read_index(folder: Path) -> dict[str, int]:
    """Samples per shard as index.json beside the shards says, or nothing."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        counts = {str(k): int(v["samples"]) for k, v in json.loads(path.read_text())["shards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an index ({error}): delete it, and the shards are counted instead") from None
    return counts


@lru_cache(maxsize=512)
def read_members(path: Path) -> list[tuple[str, dict[str, Member]]]:
    """(key, {extension: where}) of every sample of a shard, from the tar's headers alone."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[extension.lower()] = Member(info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path} cannot be read: {error}") from None
    return list(samples.items())


@dataclass
class RawSample:
    """One sample as stored."""

    shard: Path
    key: str
    fields: dict[str, bytes]

    @property
    def name(self) -> str:
        return f"{self.shard}:{self.key}"

    @property
    def image(self) -> bytes:
        for extension in IMAGE_EXTENSIONS:
            if extension in self.fields:
                return self.fields[extension]
        raise DataError(
            f"{self.name} has no image; found .{', .'.join(self.fields)}, accepted .{', .'.join(IMAGE_EXTENSIONS)}"
        )

    @property
    def captions(self) -> list[str]:
        """All texts of the sample: the lines of .txt, or `caption(s)` of .json."""
        texts: list[str] = []
        if "txt" in self.fields or "caption" in self.fields:
            texts = self.fields.get("txt", self.fields.get("caption", b"")).decode("utf-8", "replace").splitlines()
        elif "json" in self.fields:
            found = self.meta.get("captions", self.meta.get("caption"))
            texts = [found] if isinstance(found, str) else [str(t) for t in found or []]
        texts = [" ".join(text.replace("\0", " ").split()) for text in texts]
        texts = [text for text in texts if text]
        if not texts:
            raise DataError(f"{self.name} has an empty caption; expected text in .txt, or 'caption(s)' in .json")
        return texts

    @property
    def meta(self) -> dict:
        try:
            meta = json.loads(self.fields.get("json", b"{}"))
        except ValueError as error:
            raise DataError(f"{self.name}: its .json is not JSON ({error})") from None
        return meta if isinstance(meta, dict) else {}

    @property
    def sample_id(self) -> int:
        """A hash of the key and the last three parts of the shard's path: coco/train/000.tar is not cc3m/train/000.tar."""
        return stable_id(f"{'/'.join(self.shard.resolve().parts[-3:])}:{self.key}")

    @property
    def image_id(self) -> int:
        """`image_id` of .json: samples that show the same picture have the same one. Without it, the sample's own."""
        found = self.meta.get("image_id") if "json" in self.fields else None
        if found is None:
            return self.sample_id
        return found if isinstance(found, int) else stable_id(str(found))


def stable_id(name: str) -> int:
    """A positive int64 that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def read_sample(path: Path, row: int) -> RawSample:
    key, members = read_members(path)[row]
    fields = {}
    try:
        with open(path, "rb") as file:
            for extension, member in members.items():
                file.seek(member.offset)
                fields[extension] = file.read(member.size)
                if len(fields[extension]) < member.size:
                    raise DataError(f"shard {path} is truncated at sample {key}")
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error}") from None
    return RawSample(path, key, fields)
