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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from vlmo_ds.data.meta import parse_json, printable
from vlmo_ds.data.storage import DataError, Storage, expand, is_remote, opened, retried, write_atomically
from vlmo_ds.progress import progress

INDEX = "index.json"
BLOCK = tarfile.BLOCKSIZE
TEXT_EXTENSIONS = ("txt", "caption", "json")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MOST_SAMPLES = 10_000_000  # of one shard: 5 GB of headers alone
PACKERS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
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
        """[samples + 1] int64: where each sample begins, and where the last one ends. DataError if they do not fit."""
        return None if not self.offsets else unpack_spans(self.offsets, self.samples)

    def text_lengths(self) -> np.ndarray | None:
        """[samples] uint16: bytes of text of each sample (of .txt or .caption, else of .json), at most 65535."""
        return None if not self.lengths else unpack(self.lengths, np.uint16, self.samples)

    def record(self) -> dict[str, int | str]:
        return {"samples": self.samples, "bytes": self.bytes, "offsets": self.offsets, "lengths": self.lengths}


def pack(values: np.ndarray) -> str:
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode()


def unpack(text: str, dtype: type, count: int) -> np.ndarray:
    """So many numbers. DataError for any other content, of which no more is inflated than they would take."""
    little = np.dtype(dtype).newbyteorder("<")
    size = count * little.itemsize
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(text), size + 1)
    except (ValueError, zlib.error) as error:
        raise DataError(f"offsets or lengths are damaged: {error}") from None
    if len(data) != size or inflater.unconsumed_tail or not inflater.eof:
        raise DataError(f"offsets or lengths are not the {count} numbers that its samples need")
    return np.frombuffer(data, dtype=little)


def unpack_spans(text: str, samples: int) -> np.ndarray:
    """As ShardIndex.spans."""
    spans = unpack(text, np.uint32, samples + 1).cumsum(dtype=np.int64)
    spans *= BLOCK
    return spans


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a tar member, as WebDataset splits them: at the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), extension.lower()


def members(
    stream: BinaryIO, mode: Literal["r:", "r|"] = "r:"
) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """(key, extension, header, tar) of every file of a tar that belongs to a sample. TarError for a damaged one."""
    try:
        with tarfile.open(fileobj=stream, mode=mode) as tar:
            for info in tar:
                if info.size < 0 or info.issparse():  # the one leads round in circles, the other unpacks to any size
                    raise tarfile.ReadError(f"{info.name!r} has a size of {info.size}, or is sparse")
                key, extension = split_name(info.name)
                if info.isfile() and key and extension:
                    yield key, extension, info, tar
            if mode == "r:":  # tarfile takes a damaged header for the end
                stream.seek(tar.offset)
                if stream.read(BLOCK).strip(b"\0"):
                    raise tarfile.ReadError(f"its headers are damaged at byte {tar.offset}")
    except (ValueError, OverflowError, IndexError, RecursionError) as error:  # of tarfile, for headers made to harm
        if isinstance(error, DataError):
            raise
        raise tarfile.ReadError(f"its headers are damaged ({error})") from None


@dataclass
class Scan:
    """What the headers of a tar say, member by member."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    end: int = 0
    key: str | None = None
    known: set[str] = field(default_factory=set)
    usable: bool = True  # whether the last sample has a member that is read
    dotted: str = ""  # a member of it that would be, with one dot less
    apart: list[str] = field(default_factory=list)
    too_many_dots: list[str] = field(default_factory=list)

    def add(self, key: str, extension: str, info: tarfile.TarInfo) -> None:
        if key != self.key:
            self.end_sample()
            if key in self.known:
                self.apart.append(printable(info.name))
            self.known.add(key)
            self.key, self.usable, self.dotted = key, False, ""
            self.starts.append(info.offset)
            self.lengths.append(0)
        self.end = info.offset_data + -(-info.size // BLOCK) * BLOCK
        if extension in TEXT_EXTENSIONS and (extension != "json" or not self.lengths[-1]):
            self.lengths[-1] = min(info.size, 65535)
        self.usable |= is_read(extension)
        if not is_read(extension) and extension.rpartition(".")[2] in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
            self.dotted = printable(info.name)

    def end_sample(self) -> None:
        if not self.usable and self.dotted:
            self.too_many_dots.append(self.dotted)

    def drop_last(self) -> None:
        """Takes back the sample that is not whole."""
        if self.starts:
            self.end = self.starts.pop()
            self.lengths.pop()

    def index(self, size: int) -> ShardIndex:
        if not self.starts:
            return ShardIndex(0, size)
        blocks = np.diff(np.array([0, *self.starts, self.end]) // BLOCK).astype(np.uint32)
        return ShardIndex(len(self.starts), size, pack(blocks), pack(np.array(self.lengths, dtype=np.uint16)))

    def complaints(self) -> list[str]:
        """What keeps whole samples from being used, in words."""
        found = []
        if self.apart:
            found.append(
                f"members of one sample do not lie side by side ({self.apart[0]} and {len(self.apart) - 1} more come "
                "after other samples): write the tar again in the order of names, as with `tar --sort=name`"
            )
        if self.too_many_dots:
            found.append(
                f"{len(self.too_many_dots)} samples have dots in their names ({self.too_many_dots[0]}): what follows the "
                "first one is taken for the extension, so name them without"
            )
        return found


def is_read(extension: str) -> bool:
    """Whether a member with this extension is part of what a sample is made of; 0.png and 1.png are a pair's images."""
    return extension in TEXT_EXTENSIONS or extension.removeprefix("0.").removeprefix("1.") in IMAGE_EXTENSIONS


def scan(stream: BinaryIO, size: int, mode: Literal["r:", "r|"] = "r:") -> tuple[ShardIndex, str]:
    """The index of a tar from its headers, and what is wrong with the file ("" if nothing is).

    Successive members with one key are a sample. Of a truncated file the whole samples count.
    """
    found, problem = Scan(), ""
    try:
        for key, extension, info, _ in members(stream, mode):
            if size >= 0 and info.offset_data + info.size > size:
                problem = f"it ends within {printable(info.name)}"
                if found.key == key:
                    found.drop_last()
                break
            found.add(key, extension, info)
        else:
            found.end_sample()
    except TAR_ERRORS as error:
        problem = str(error) or type(error).__name__
        if size < 0:  # of a stream that ends early the last sample is not whole
            found.drop_last()
    index = found.index(size)
    if index.samples == 0:
        return index, problem or "it holds no samples"
    if problem:
        problem = f"{problem}; its first {index.samples} samples count"
    return index, "; ".join([problem, *found.complaints()] if problem else found.complaints())


def packed_with(path: str) -> str:
    """What a file is compressed with, by its first bytes; "" for none."""
    with open(path, "rb") as file:
        return PACKERS.get(file.read(2), "")


def scan_shard(url: str, storage: Storage) -> tuple[ShardIndex, str]:
    """As scan; a remote file is streamed once and not kept. DataError where it cannot be opened."""
    if is_remote(url):

        def stream() -> tuple[ShardIndex, str]:
            with opened(url, storage.stall_seconds) as source:
                index, problem = scan(source, -1, "r|")  # type: ignore[arg-type]  # "r|" does nothing but read
                while source.read(1 << 20):  # to the end: an interrupted transfer has to be noticed
                    pass
                index.bytes = source.bytes
                return index, problem

        return retried(stream, storage.tries, url)
    try:
        if packer := packed_with(url):
            return ShardIndex(
                0, os.path.getsize(url)
            ), f"it is compressed with {packer}, which is not supported: unpack it"
        with open(url, "rb") as file:
            return scan(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"shard {url} cannot be read: {error.strerror or error}") from None


def parse_index(text: str | bytes, source: str) -> dict[str, ShardIndex]:
    """Shard name -> index. Raises DataError naming the file."""
    try:
        records = dict(parse_json(text)["shards"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{source} is not an index ({error!r:.200}): delete it, and build it again") from None
    return {name: parse_record(record, f"{source}, {name}") for name, record in records.items()}


def parse_record(record: dict, place: str) -> ShardIndex:
    """One shard of an index. Raises DataError for what no shard can be."""
    try:
        samples, size = record["samples"], record.get("bytes", -1)
        texts = record.get("offsets", ""), record.get("lengths", "")
        if not all(type(n) is int for n in (samples, size)) or not all(isinstance(text, str) for text in texts):
            raise TypeError("samples and bytes have to be whole numbers, offsets and lengths text")
        most = min(MOST_SAMPLES, size // BLOCK) if size >= 0 else MOST_SAMPLES
        if not 0 <= samples <= most or size < -1:
            raise ValueError(f"{samples} samples in {size} bytes, where at most {most} can be")
        index = ShardIndex(samples, size, *texts)
        index.spans()
        index.text_lengths()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{place}: this is not an index ({what!s:.200}): delete the file, and build it again") from None
    return index


def dump_index(shards: Mapping[str, ShardIndex]) -> bytes:
    return (json.dumps({"shards": {name: s.record() for name, s in shards.items()}}, indent=1) + "\n").encode()


def build(urls: Sequence[str], storage: Storage, processes: int) -> tuple[dict[str, ShardIndex], list[str]]:
    """The index of each shard, and a line about each shard with a fault."""
    found: dict[str, ShardIndex] = {}
    faults = []
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(partial(scan_shard, storage=storage), urls)
        for url, (index, problem) in zip(urls, progress(results, "index", len(urls), "shards"), strict=True):
            found[url] = index
            if problem:
                faults.append(f"{url}: {problem}")
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
        if not any(index.samples for index in found.values()):
            raise DataError(f"none of {len(found)} shards holds a sample; {faults[0]}")
        for target in sorted(set(folders.values())):
            first: dict[str, str] = {}
            for url in dict.fromkeys(url for url in urls if folders[url] == target):
                if url != (other := first.setdefault(url.rsplit("/", 1)[-1], url)):
                    raise DataError(
                        f"{other} and {url} have the same name; {target} can hold one of them: build two indexes"
                    )
            names = {name: found[url] for name, url in first.items()}
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
