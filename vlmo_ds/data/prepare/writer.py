"""Writes shard sets: several processes, one shard each at a time; a set appears under its name when it is whole."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import webdataset as wds

from vlmo_ds.data.index import INDEX, ShardIndex, dump_index, scan
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.progress import Progress

PARTIAL = ".partial"  # suffix of the folder that holds a set until it is whole
PROGRESS = ".progress"  # in it: what was begun, and a report of each finished shard


@dataclass(frozen=True)
class Sample:
    """Members by extension, and the number of texts in them."""

    fields: dict[str, bytes]
    captions: int


@dataclass(frozen=True)
class Rejected:
    """A sample that is left out, and why."""

    reason: str


Made = Iterator[Sample | Rejected]


@dataclass
class Plan:
    """What a shard set is made of: each item gives any number of samples, wherever and whenever `make` is called.

    make has to be picklable and a function of the item alone; extra: files to lie beside the shards.
    """

    prefix: str
    items: Sequence[Any]
    make: Callable[[Any], Made]
    extra: Mapping[str, bytes] = field(default_factory=dict)
    items_per_shard: int = 0  # 0: as many as samples_per_shard

    def shard_items(self, shard: int, per_shard: int) -> Sequence[Any]:
        return self.items[shard * per_shard : (shard + 1) * per_shard]


@dataclass
class ShardReport:
    """What became of a shard's items."""

    index: ShardIndex
    captions: int = 0
    content_bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


def write_set(
    plan: Plan, folder: Path, *, samples_per_shard: int = 1000, processes: int = 1, overwrite: bool = False
) -> str:
    """Writes the shards and their index.json, and returns a summary.

    The same plan gives the same bytes with any number of processes. Shards that an interrupted call has finished are
    kept. A finished set is replaced, once the new one is whole, only with overwrite.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    check_target(folder, overwrite)
    per_shard = plan.items_per_shard or samples_per_shard
    lock = begin(partial, plan, per_shard)
    count = -(-len(plan.items) // per_shard)
    reports = {n: report for n in range(count) if (report := read_report(partial, plan.prefix, n))}
    missing = [n for n in range(count) if n not in reports]
    done = sum(r.index.samples for r in reports.values())
    if done:
        print(f"{folder}: {len(reports)} shards of an earlier call are kept", file=sys.stderr)
    bar = Progress(str(folder), len(plan.items), "items", done=min(len(reports) * per_shard, len(plan.items)))
    for number, report in run(plan, partial, per_shard, missing, processes):
        reports[number] = report
        bar.advance(len(plan.shard_items(number, per_shard)))
    bar.close()
    finish(partial, folder, plan, reports)
    lock.close()
    return summary(folder, reports)


def check_target(folder: Path, overwrite: bool) -> None:
    if (folder / INDEX).exists():
        if not overwrite:
            raise DataError(f"{folder} holds a finished shard set: choose another --output, or pass --overwrite")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not a shard set: choose another --output")


def begin(partial: Path, plan: Plan, per_shard: int) -> IO:
    """Makes the folder, or checks that what is in it is of the same plan; temporary files of a killed call go.

    Returns the file whose lock keeps another call out. DataError where one is at work, or was begun otherwise.
    """
    digest = hashlib.blake2b(repr((plan.prefix, per_shard, identity(plan.make))).encode(), digest_size=16)
    for item in plan.items:
        digest.update(repr(item).encode(errors="surrogatepass"))
    made = {"items": len(plan.items), "items_per_shard": per_shard, "digest": digest.hexdigest()}
    if not partial.exists():
        (partial / PROGRESS).mkdir(parents=True)
        write_atomically(partial / PROGRESS / "plan.json", json.dumps(made).encode())
    try:
        found = json.loads((partial / PROGRESS / "plan.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != made:
        raise DataError(
            f"{partial} was begun with other input or settings: remove it, or repeat the call that began it"
        )
    lock = open(partial / PROGRESS / "lock", "w")  # noqa: SIM115 (held until the set is whole)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: those it starts do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise DataError(f"{partial} is being written by another call of this command") from None
    for leftover in [*partial.glob("*.tmp"), *(partial / PROGRESS).glob("*.tmp")]:
        leftover.unlink(missing_ok=True)
    return lock


def identity(make: Callable) -> tuple:
    """A function and the arguments bound to it, in words that are the same in every process."""
    if isinstance(make, functools.partial):
        return (*identity(make.func), make.args, sorted(make.keywords.items()))
    return make.__module__, make.__qualname__


def run(
    plan: Plan, partial: Path, per_shard: int, missing: Sequence[int], processes: int
) -> Iterator[tuple[int, ShardReport]]:
    arguments = ((n, (partial, plan.prefix, n, n * per_shard, plan.shard_items(n, per_shard))) for n in missing)
    if processes == 1:
        for number, job in arguments:
            yield number, write_shard(plan.make, *job)
        return
    with ProcessPoolExecutor(processes, initializer=start_process, initargs=(os.getpid(),)) as pool:
        pending: dict[Future, int] = {}
        try:
            for number, job in arguments:
                pending[pool.submit(write_shard, plan.make, *job)] = number
                if len(pending) == 2 * processes:
                    yield from collected(pending, wait(pending, return_when=FIRST_COMPLETED).done)
            yield from collected(pending, wait(pending).done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collected(pending: dict[Future, int], done: Iterable[Future]) -> Iterator[tuple[int, ShardReport]]:
    for future in done:
        yield pending.pop(future), future.result()


def start_process(parent: int) -> None:
    """One thread each; and a killed call must not leave processes that wait for work for ever."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the shards under way are finished

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shard(make: Callable[[Any], Made], partial: Path, prefix: str, number: int, first: int, items) -> ShardReport:
    """One shard under a temporary name, then its report, then its own name. A shard without samples is not kept."""
    report = ShardReport(ShardIndex(0))
    target = shard_path(partial, prefix, number)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for position, item in enumerate(items, start=first):
            for part, made in enumerate(make(item)):
                if isinstance(made, Rejected):
                    report.rejects[made.reason] += 1
                    continue
                key = f"{position:08d}" + (f"-{part}" if part else "")
                writer.write({"__key__": key, **made.fields})
                report.captions += made.captions
                report.content_bytes += sum(map(len, made.fields.values()))
                report.index.samples += 1
    if report.index.samples:
        with open(temporary, "rb") as written:
            report.index, problem = scan(written, temporary.stat().st_size)
        if problem:
            raise DataError(f"{temporary}: {problem}: the disk is failing")
    record = {"index": report.index.record(), "rejects": report.rejects}
    record |= {"captions": report.captions, "content_bytes": report.content_bytes}
    write_atomically(report_path(partial, number), json.dumps(record).encode())
    if report.index.samples:
        temporary.replace(target)
    else:
        temporary.unlink()
    return report


def shard_path(folder: Path, prefix: str, number: int) -> Path:
    return folder / f"{prefix}-{number:06d}.tar"


def report_path(partial: Path, number: int) -> Path:
    return partial / PROGRESS / f"{number:06d}.json"


def read_report(partial: Path, prefix: str, number: int) -> ShardReport | None:
    """The report of a shard that is whole."""
    try:
        record = json.loads(report_path(partial, number).read_text())
    except (OSError, ValueError):
        return None
    index = ShardIndex(**record["index"])
    path = shard_path(partial, prefix, number)
    if index.samples and not (path.exists() and path.stat().st_size == index.bytes):
        return None
    return ShardReport(index, record["captions"], record["content_bytes"], Counter(record["rejects"]))


def finish(partial: Path, folder: Path, plan: Plan, reports: Mapping[int, ShardReport]) -> None:
    """Adds the index, and puts the folder in its place."""
    whole = {shard_path(partial, plan.prefix, n).name: r.index for n, r in sorted(reports.items()) if r.index.samples}
    if not whole:
        rejects = sum((r.rejects for r in reports.values()), Counter())
        reasons = "; ".join(f"{n} x {reason}" for reason, n in rejects.most_common()) or "the source is empty"
        shutil.rmtree(partial)
        raise DataError(f"nothing to write to {folder}: {reasons}")
    for name, content in plan.extra.items():
        write_atomically(partial / name, content)
    write_atomically(partial / INDEX, dump_index(whole))
    if folder.exists():
        folder.rename(partial / PROGRESS / "replaced")
    partial.rename(folder)
    shutil.rmtree(folder / PROGRESS)


def summary(folder: Path, reports: Mapping[int, ShardReport]) -> str:
    whole = [r for r in reports.values() if r.index.samples]
    rejects = sum((r.rejects for r in reports.values()), Counter())
    lines = [
        f"{folder}: {len(whole)} shards, {sum(r.index.samples for r in whole)} samples, "
        f"{sum(r.captions for r in whole)} captions, {sum(r.content_bytes for r in whole) / 1e6:.1f} MB, "
        f"{rejects.total()} rejected"
    ]
    return "\n".join(lines + [f"  rejected {n}: {reason}" for reason, n in rejects.most_common()])
