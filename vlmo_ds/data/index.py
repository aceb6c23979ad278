"""The index of a shard set: samples, size and byte offsets of every shard, in an index.json beside them.

    python -m vlmo_ds.data.index FOLDER [FOLDER or URL ...] [--output FILE]

builds it for shards that came without one. Offsets and text lengths are packed (differences of 512-byte blocks,
deflated, base64), so that an index of ten million samples is read in a fraction of a second.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from vlmo_ds.data.meta import parse_json, printable
from vlmo_ds.data.storage import DataError, Storage, expand, is_remote, opened, retried, write_atomically

INDEX = "index.json"
BLOCK = tarfile.BLOCKSIZE
TEXT_EXTENSIONS = ("txt", "caption", "json")
# What Python's reader raises of damaged tars: its own errors, and others that come through it.
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)


@dataclass
class ShardIndex:
    """One shard: samples; bytes of the file, -1 if unknown; packed offsets and text lengths, "" if unknown."""

    samples: int
    bytes: int = -1
    offsets: str = ""
    lengths: str = ""

    def spans(self) -> np.ndarray | None:
        """[samples + 1] int64: where each sample begins, and where the last one ends."""
        if not self.offsets:
            return None
        return unpack(self.offsets, np.uint32, self.samples + 1).astype(np.int64).cumsum() * BLOCK

    def text_lengths(self) -> np.ndarray | None:
        """[samples] uint16: bytes of text of each sample (of .txt or .caption, else of .json), at most 65535."""
        return None if not self.lengths else unpack(self.lengths, np.uint16, self.samples)

    def record(self) -> dict[str, int | str]:
        return {"samples": self.samples, "bytes": self.bytes, "offsets": self.offsets, "lengths": self.lengths}


def pack(values: np.ndarray) -> str:
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode()


def unpack(text: str, dtype: type, count: int) -> np.ndarray:
    """So many values that pack has packed. DataError where it is another number of them, or none at all."""
    size = count * np.dtype(dtype).itemsize
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise DataError(f"the index is damaged ({error}): delete it, and build it again") from None
    if len(content) != size or not unpacking.eof:
        raise DataError(f"the index is damaged (it does not hold {count} values): delete it, and build it again")
    return np.frombuffer(content, dtype=np.dtype(dtype).newbyteorder("<"))


class Header(tarfile.TarInfo):
    """Without negative sizes, with which Python's reader goes back in the file, for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("a file of negative size")
        return super()._block(count)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a tar member, as WebDataset splits them: at the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), extension.lower()


def members(stream: BinaryIO, mode: str = "r:") -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """(key, extension, header, tar) of every file of a tar that belongs to a sample."""
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=Header) as tar:
        for info in tar:
            key, extension = split_name(info.name)
            if info.isfile() and key and extension:
                yield key, extension, info, tar


def scan(stream: BinaryIO, size: int, mode: str = "r:") -> tuple[ShardIndex, str]:
    """The index of a tar from its headers, and what is wrong with the file ("" if nothing is).

    Successive members with one key are a sample. Of a truncated file the whole samples count.
    """
    starts, lengths, keys = [], [], []
    end, problem = 0, ""
    try:
        for key, extension, info, _ in members(stream, mode):
            after = info.offset_data + -(-info.size // BLOCK) * BLOCK
            if size >= 0 and info.offset_data + info.size > size:
                problem = f"it ends within {printable(info.name)}"
                if keys and keys[-1] == key:
                    end = starts.pop()
                    lengths.pop()
                break
            if not keys or keys[-1] != key:
                starts.append(info.offset)
                lengths.append(0)
                keys.append(key)
            end = after
            if extension in TEXT_EXTENSIONS and (extension != "json" or not lengths[-1]):
                lengths[-1] = min(info.size, 65535)
    except TAR_ERRORS as error:
        problem = str(error) or type(error).__name__
        if size < 0 and starts:  # of a stream that ends early the last sample is not whole
            end = starts.pop()
            lengths.pop()
    if not starts:
        return ShardIndex(0, size), problem or "it holds no samples"
    blocks = np.diff(np.array([0, *starts, end]) // BLOCK).astype(np.uint32)
    return ShardIndex(len(starts), size, pack(blocks), pack(np.array(lengths, dtype=np.uint16))), problem


def scan_shard(url: str, storage: Storage) -> tuple[ShardIndex, str]:
    """As scan; a remote file is streamed once and not kept. DataError where it cannot be opened."""
    if is_remote(url):

        def stream() -> tuple[ShardIndex, str]:
            with opened(url, storage.stall_seconds) as source:
                index, problem = scan(source, -1, "r|")
                while source.read(1 << 20):  # to the end: an interrupted transfer has to be noticed
                    pass
                index.bytes = source.bytes
                return index, problem

        return retried(stream, storage.tries, url)
    try:
        with open(url, "rb") as file:
            return scan(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {url} cannot be read: {error.strerror or error}") from None


def parse_index(text: str | bytes, source: str) -> dict[str, ShardIndex]:
    """Shard name -> index. Raises DataError naming the file."""
    try:
        records = parse_json(text)["shards"]
        return {
            str(name): ShardIndex(
                int(r["samples"]), int(r.get("bytes", -1)), str(r.get("offsets", "")), str(r.get("lengths", ""))
            )
            for name, r in records.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{source} is not an index ({error!r}): delete it, and build it again") from None


def dump_index(shards: Mapping[str, ShardIndex]) -> bytes:
    return (json.dumps({"shards": {name: s.record() for name, s in shards.items()}}, indent=1) + "\n").encode()


def build(urls: Sequence[str], storage: Storage, processes: int) -> tuple[dict[str, ShardIndex], list[str]]:
    """The index of each shard, and a line about each shard with a fault."""
    found: dict[str, ShardIndex] = {}
    faults = []
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(partial(scan_shard, storage=storage), urls)
        for url, (index, problem) in zip(urls, tqdm(results, total=len(urls), unit="shard", desc="index"), strict=True):
            found[url] = index
            if problem:
                faults.append(f"{url}: {problem}; its first {index.samples} samples count")
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="folders, tar files, URLs; {000..009} and * are expanded")
    parser.add_argument("--output", type=Path, help="index file; needed for remote shards, else index.json beside them")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    args = parser.parse_args()
    try:
        urls = expand(args.shards)
        if args.output is None and any(map(is_remote, urls)):
            raise DataError("--output is needed: an index of remote shards cannot be written beside them")
        folders = {url: args.output or Path(url).parent / INDEX for url in urls}
        found, faults = build(urls, Storage(), max(1, args.processes))
        for target in sorted(set(folders.values())):
            chosen = {url: found[url] for url in urls if folders[url] == target}
            names = {url.rsplit("/", 1)[-1]: index for url, index in chosen.items()}
            if len(names) < len(chosen):
                raise DataError(f"two of the shards have the same name; {target} can hold one of them")
            write_atomically(target, dump_index(names))
            print(f"{target}: {len(names)} shards, {sum(s.samples for s in names.values())} samples")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
