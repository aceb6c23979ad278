"""How fast a stage trains, what it waits for, and what to do about it.

The time of a step is cut into waiting for data, collectives (waiting for other ranks included), writing checkpoints, and computing,
which is the rest. Every WINDOW steps the ranks tell each other theirs, and rank 0 says which are slow, and why if that is clear.
Nothing of it is in metrics.jsonl, which is the same for the same run.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlmo_ds.config import ModelConfig, StageConfig
from vlmo_ds.distributed import clock

WINDOW = 100  # steps
SAMPLED_EVERY = 10  # steps, of which one is timed on a GPU
DATA, RANKS, WRITING = "waiting for data", "in collectives", "writing checkpoints"
MUCH = 0.1  # share of the time of a step that is worth a word
SLOWER = 1.25  # times the median of computing that make a rank slow
# Dense 16-bit TFLOP/s of a device by words of its name (NVIDIA's data sheets), the longer ones first.
TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A6000": 155,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


class Seconds(NamedTuple):
    """Of a rank's steps, in all and in each part; computing is the rest."""

    total: float
    data: float
    ranks: float
    writing: float

    @property
    def computing(self) -> float:
        return max(self.total - self.data - self.ranks - self.writing, 0.0)

    def share(self, part: float) -> float:
        return part / self.total if self.total else 0.0


class Rank(NamedTuple):
    """What a rank tells of a window."""

    host: str
    number: int
    seconds: Seconds
    memory: float  # bytes held at most, of its device or, on a CPU, of the process

    @property
    def name(self) -> str:
        return f"rank {self.number} on {self.host}"


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens_of(batch: Mapping[str, Tensor], patches: int) -> int:
    """Patches, class tokens and word pieces that a micro-batch has."""
    found = 0
    for name, value in batch.items():
        what = name.rpartition("/")[2]
        if what in ("image", "image_0", "image_1"):
            found += len(value) * (patches + 1)
        elif what == "text_masks":
            found += int(value.sum())
    return found


def rate_of_device(half: bool) -> float | None:
    """FLOP/s that a GPU promises in 16 bits; None where that is not known or not what is computed in."""
    if not (half and torch.cuda.is_available()):
        return None
    name = torch.cuda.get_device_name()
    return next((1e12 * rate for words, rate in TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def flops_of(model: ModelConfig, stage: StageConfig) -> float:
    """Useful operations of an optimiser step over all ranks: recomputation and padding do not count."""
    return 3 * stage.family.cost().forward_flops(model, stage, stage.global_batch_size)


class Pace:
    """The clock of a stage on this rank."""

    def __init__(self, flops: float, half: bool, ranks: int, rank: int):
        """flops: of a step over all ranks; half: whether it computes in 16 bits."""
        self.flops, self.ranks, self.rank = flops, ranks, rank
        self.rate = rate_of_device(half)
        self.parts = dict.fromkeys((DATA, RANKS, WRITING), 0.0)  # of the step that runs
        self.last = Seconds(0.0, 0.0, 0.0, 0.0)
        self.window: list[Seconds] = []
        self.recent: deque[tuple[Seconds, float]] = deque(maxlen=WINDOW)  # of steps: means over ranks; tokens of all
        self.steps = self.tokens = self.last_tokens = 0
        self.started = self.began = time.monotonic()

    def begin(self) -> None:
        """The first step begins."""
        clock.taken()
        self.started = self.began = time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Collectives in it count as such."""
        started, before = time.monotonic(), clock.so_far()
        yield
        self.parts[name] += time.monotonic() - started - (clock.so_far() - before)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What is no part of any step: evaluations."""
        started, before = time.monotonic(), clock.so_far()
        yield
        clock.forget(clock.so_far() - before)
        self.began += time.monotonic() - started

    def told(self) -> dict[str, float]:
        """Of the last step, to be summed over ranks."""
        seconds = {f"seconds/{name}": value for name, value in self.last._asdict().items()}
        return {**seconds, "tokens": float(self.last_tokens)}

    def step(self, sums: Mapping[str, float]) -> None:
        """A step ends. sums: over ranks, of what `told` gave in it."""
        if self.steps:
            means = Seconds(*(sums[f"seconds/{name}"] / self.ranks for name in Seconds._fields))
            self.recent.append((means, sums["tokens"]))
        now = time.monotonic()
        # on a GPU those of the last step that was measured
        self.parts[RANKS] = clock.taken() if clock.measured else self.last.ranks
        self.last = Seconds(now - self.began, *self.parts.values())
        self.window.append(self.last)
        self.last_tokens, self.tokens = self.tokens, 0
        self.parts = dict.fromkeys(self.parts, 0.0)
        self.began = now
        self.steps += 1
        clock.measured = not torch.cuda.is_available() or self.steps % SAMPLED_EVERY == 0

    # ---- what is shown ----

    def scalars(self, samples: int) -> dict[str, float]:
        """For TensorBoard, of the last WINDOW steps. samples: of a step over all ranks."""
        steps = [means for means, _ in self.recent] or [self.last]
        total = max(sum(step.total for step in steps), 1e-9)
        seconds = total / len(steps)
        found = {"seconds_per_step": seconds, "samples_per_second": samples / seconds}
        tokens = [tokens for _, tokens in self.recent] or [float(self.ranks * self.last_tokens)]
        found["tokens_per_second"] = sum(tokens) / total
        found["tflops_per_device"] = self.flops / seconds / self.ranks / 1e12
        if self.rate:
            found["share_of_device_rate"] = 1e12 * found["tflops_per_device"] / self.rate
        found |= {
            f"share_{name}": sum(getattr(step, name) for step in steps) / total for name in ("data", "ranks", "writing")
        }
        found["peak_memory_gb"] = peak_memory() / 1e9
        return {f"throughput/{name}": value for name, value in found.items()}

    def line(self, scalars: Mapping[str, float], left: float) -> str:
        """scalars: what `scalars` gave; left: steps like these until the run ends."""
        found = {name.removeprefix("throughput/"): value for name, value in scalars.items()}
        seconds = found["seconds_per_step"]
        shares = ", ".join(f"{name} {found[f'share_{name}']:.0%}" for name in ("data", "ranks", "writing"))
        of_rate = f" ({found['share_of_device_rate']:.0%})" if self.rate else ""
        rate = found["tflops_per_device"]
        flops = f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1000 * rate:.3g} GFLOP/s"
        return (
            f"{seconds:.3g} s/step ({shares})  {found['samples_per_second']:.1f} samples/s  "
            f"{short(found['tokens_per_second'])} tokens/s  {flops}{of_rate}  "
            f"{found['peak_memory_gb']:.1f} GB  {hours(time.monotonic() - self.started)} gone  {hours(left * seconds)} left"
        )

    def of_window(self) -> Rank:
        """What this rank tells of the steps since the last time; of none before the first."""
        steps, self.window = self.window or [self.last], []
        means = Seconds(*(statistics.fmean(values) for values in zip(*steps, strict=True)))
        return Rank(socket.gethostname(), self.rank, means, float(peak_memory()))


def short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def hours(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Spread(NamedTuple):
    """The least, the median and the most of a number over ranks, and who has the most."""

    least: float
    median: float
    most: float
    who: Rank

    @classmethod
    def of(cls, ranks: Sequence[Rank], number: Callable[[Rank], float]) -> Spread:
        values = sorted(map(number, ranks))
        return cls(values[0], statistics.median(values), values[-1], max(ranks, key=number))


def spreads(ranks: Sequence[Rank]) -> dict[str, Spread]:
    """Seconds of computing and of a whole step, shares of the parts, bytes."""
    return {
        "seconds": Spread.of(ranks, lambda rank: rank.seconds.total),
        "computing": Spread.of(ranks, lambda rank: rank.seconds.computing),
        "data": Spread.of(ranks, lambda rank: rank.seconds.share(rank.seconds.data)),
        "ranks": Spread.of(ranks, lambda rank: rank.seconds.share(rank.seconds.ranks)),
        "writing": Spread.of(ranks, lambda rank: rank.seconds.share(rank.seconds.writing)),
        "memory": Spread.of(ranks, lambda rank: rank.memory),
    }


def summary(found: Mapping[str, Spread], ranks: int) -> str:
    """In one line."""
    of, parts = found["computing"], []
    for name, what in (("data", DATA), ("ranks", RANKS), ("writing", WRITING)):
        share = found[name]
        who = f" ({share.who.name})" if ranks > 1 and share.most > MUCH else ""
        parts.append(f"{what} {share.least:.0%} to {share.most:.0%}{who}" if ranks > 1 else f"{what} {share.most:.0%}")
    memory = f"{found['memory'].most / 1e9:.1f} GB"
    if ranks == 1:
        return f"a step computes for {of.most:.3g} s; {'; '.join(parts)}; {memory}"
    return (
        f"a step computes for {of.least:.3g} to {of.most:.3g} s, median {of.median:.3g} (slowest: {of.who.name}); {'; '.join(parts)}; "
        f"at most {memory} ({found['memory'].who.name})"
    )


def advice(ranks: Sequence[Rank], stage: StageConfig, folder: Path) -> dict[str, str]:
    """What limits the stage, where that is clear: by its kind, in words."""
    found, spread = {}, spreads(ranks)
    if (data := spread["data"]).most > MUCH:
        starved = sum(rank.seconds.share(rank.seconds.data) > MUCH for rank in ranks)
        workers, cores = stage.data.workers, len(os.sched_getaffinity(0))
        more = max(2 * workers, 2)
        what = f"data.workers {workers} -> {more}"
        if more > cores:
            what = f"the {cores} cores here are what limits it: store smaller pictures, or take more cores"
        if starved <= len(ranks) / 2:
            what += "; the other ranks read fast enough: look at that machine's disk and network"
        found["data"] = (
            f"{starved} of {len(ranks)} ranks wait up to {data.most:.0%} of the time for data ({data.who.name}): {what}"
        )
    slow = spread["computing"]
    others = statistics.median([r.seconds.computing for r in ranks if r is not slow.who] or [slow.most])
    if slow.most > SLOWER * others and slow.most - others > MUCH * slow.who.seconds.total:
        found["slow"] = (
            f"{slow.who.name} computes {slow.most / max(others, 1e-9):.1f} times as long as the others ({slow.most:.3g} s a step in place of "
            f"{others:.3g}), which wait for it: look at its clock rate, its temperature, and what else runs there"
        )
    if (writing := spread["writing"]).most > MUCH and stage.checkpoint_every:
        rarer = stage.checkpoint_every * max(2, round(2 * writing.most / MUCH))
        found["writing"] = (
            f"writing checkpoints takes {writing.most:.0%} of the time ({writing.who.name}): checkpoint_every {stage.checkpoint_every} -> "
            f"{rarer}, or a faster disk for {folder}"
        )
    return found
