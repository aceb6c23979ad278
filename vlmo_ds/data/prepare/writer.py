"""Writes shard sets: each shard under a temporary name until it is whole, the index last."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import webdataset as wds

from vlmo_ds.data.shards import INDEX, DataError, write_atomically


class ShardSetWriter:
    """A folder of tars `<prefix>-000000.tar` and their index.json. Use as a context manager.

    The same samples in the same order give the same bytes. A folder that was finished before is refused unless it is
    given up with overwrite; an unfinished one is begun anew.
    """

    def __init__(self, folder: Path, *, prefix: str, samples_per_shard: int = 1000, overwrite: bool = False):
        if (folder / INDEX).exists() and not overwrite:
            raise DataError(f"{folder} holds a finished shard set: choose another --output, or pass --overwrite")
        self.folder, self.prefix, self.samples_per_shard = folder, prefix, samples_per_shard
        self.counts: dict[str, int] = {}
        self.summary: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.writer: wds.TarWriter | None = None

    def __enter__(self) -> ShardSetWriter:
        self.temporary = self.folder / "shard.tar.tmp"
        return self

    def write(self, fields: dict[str, bytes], captions: int = 0) -> None:
        """One sample; its key is its number."""
        if self.writer is None:
            if not self.counts:
                self.clear()
            self.writer = wds.TarWriter(open(self.temporary, "wb"), mtime=0, encoder=False)  # noqa: SIM115
            self.in_shard = 0
        self.writer.write({"__key__": f"{self.summary['samples']:08d}", **fields})
        self.in_shard += 1
        self.summary.update(samples=1, captions=captions, bytes=sum(len(v) for v in fields.values()))
        if self.in_shard == self.samples_per_shard:
            self.publish()

    def clear(self) -> None:
        """Removes what an earlier run left, when there is something to put in its place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        for leftover in [*self.folder.glob(f"{self.prefix}-*.tar"), *self.folder.glob("*.tmp")]:
            leftover.unlink()

    def reject(self, reason: str) -> None:
        self.rejects[reason] += 1

    def publish(self) -> None:
        file = self.writer.stream
        self.writer.close()
        file.close()
        name = f"{self.prefix}-{len(self.counts):06d}.tar"
        self.temporary.replace(self.folder / name)
        self.counts[name] = self.in_shard
        self.writer = None

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            return
        if self.writer is not None:
            self.publish()
        if not self.counts:
            reasons = "; ".join(f"{n} x {r}" for r, n in self.rejects.items()) or "the source is empty"
            raise DataError(f"nothing to write to {self.folder}: {reasons}")
        shards = {name: {"samples": n} for name, n in self.counts.items()}
        write_atomically(self.folder / INDEX, json.dumps({"shards": shards}, indent=1).encode())
        print(self.report())

    def report(self) -> str:
        s = self.summary
        lines = [
            f"{self.folder}: {len(self.counts)} shards, {s['samples']} samples, {s['captions']} captions, "
            f"{s['bytes'] / 1e6:.1f} MB"
        ]
        lines += [f"  rejected {n}: {reason}" for reason, n in self.rejects.most_common()]
        return "\n".join(lines)
