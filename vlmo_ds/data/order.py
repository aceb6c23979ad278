"""The order of samples: a pure function of (seed, position), the same for any number of ranks and loader workers.

One source: in each epoch its shards are shuffled and laid end to end, and the line is cut into `lanes` equal parts. A
lane goes through its part in windows that are shuffled within; the samples of an epoch are taken from the lanes in
turn. A batch is sorted by lane, so a rank that takes a contiguous part of every batch stays on its own lanes and shards.

A mixture decides for every position of the stream which source is next; each source goes through its own epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 16  # positions of a random mixture that are drawn together


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a pure function of its key."""
    return np.random.default_rng([k & 0xFFFFFFFFFFFFFFFF for k in key])


class Place(NamedTuple):
    """Where a sample is stored, and the epoch of its source."""

    source: int
    epoch: int
    shard: int
    row: int


class SourceOrder:
    """The endless stream of one source.

    counts: samples per shard; lanes: parts each epoch is cut into (fewer if there are fewer samples); window: samples
    that are shuffled together within a lane.
    """

    def __init__(self, counts: Sequence[int], *, lanes: int, window: int, seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate(([0], self.counts.cumsum()[:-1]))
        self.total = int(self.counts.sum())
        self.lanes = min(lanes, self.total)
        self.window = window
        self.seed = seed
        self.shard_line = lru_cache(maxsize=4)(self._shard_line)
        self.window_order = lru_cache(maxsize=4 * self.lanes)(self._window_order)

    def locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of sample `index` of the stream."""
        epoch, within_epoch = divmod(index, self.total)
        position, lane = divmod(within_epoch, self.lanes)
        shorter, longer_lanes = divmod(self.total, self.lanes)  # the first lanes are one sample longer than the others
        first = lane * shorter + min(lane, longer_lanes)
        length = shorter + (lane < longer_lanes)
        window, within = divmod(position, self.window)
        size = min(self.window, length - window * self.window)
        place = first + window * self.window + int(self.window_order(epoch, lane, window, size)[within])
        shards, starts = self.shard_line(epoch)
        i = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(shards[i]), place - int(starts[i])

    def lane(self, index: int) -> float:
        """The lane of sample `index`, as a share of all lanes."""
        return index % self.total % self.lanes / self.lanes

    def stored(self, number: int) -> tuple[int, int]:
        """(shard, row) of the sample that is stored as `number` of all."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def _shard_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the place on the line where each begins."""
        shards = generator(self.seed, 1, epoch).permutation(len(self.counts))
        return shards, np.concatenate(([0], self.counts[shards].cumsum()[:-1]))

    def _window_order(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return generator(self.seed, 2, epoch, lane, window).permutation(size)


class Mixture:
    """Which source each position of the stream is taken from.

    exact: weights are whole numbers, and every run of sum(weights) samples (aligned to its length) holds exactly that
    many of each source, in random order. random: sources are drawn independently, with chances in proportion.
    """

    def __init__(self, weights: Sequence[float], *, exact: bool, seed: int):
        self.weights, self.exact, self.seed = np.asarray(weights, dtype=np.float64), exact, seed
        self.block = int(self.weights.sum()) if exact else BLOCK
        self.before = [np.zeros(len(weights), dtype=np.int64)]  # samples of each source before block 0, 1, ...
        self.drawn = lru_cache(maxsize=16)(self._drawn)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, number of its samples before) at a position of the stream."""
        if len(self.weights) == 1:
            return 0, position
        block, within = divmod(position, self.block)
        sources, ranks = self.drawn(block)
        source = int(sources[within])
        return source, int(self.samples_before(block)[source] + ranks[within])

    def consumed(self, position: int) -> np.ndarray:
        """[sources] int64: samples of each source before a position."""
        if len(self.weights) == 1:
            return np.array([position])
        block, within = divmod(position, self.block)
        sources, _ = self.drawn(block)
        return self.samples_before(block) + np.bincount(sources[:within], minlength=len(self.weights))

    def block_counts(self, block: int) -> np.ndarray:
        if self.exact:
            return self.weights.astype(np.int64)
        return generator(self.seed, 5, block).multinomial(BLOCK, self.weights / self.weights.sum())

    def samples_before(self, block: int) -> np.ndarray:
        if self.exact:
            return block * self.block_counts(0)
        while len(self.before) <= block:
            self.before.append(self.before[-1] + self.block_counts(len(self.before) - 1))
        return self.before[block]

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position of a block, and how many of the same source come before it in the block."""
        counts = self.block_counts(block)
        sources = generator(self.seed, 6, block).permutation(np.repeat(np.arange(len(counts)), counts))
        ranks = np.empty(len(sources), dtype=np.int64)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


class BatchOrder:
    """Global batches as places of samples.

    length: characters of text of a place, for `bucket` > 1: that many successive batches are then sorted by length
    together and cut anew, so that a batch holds texts of like length; the order of the new batches is random.
    """

    def __init__(
        self,
        sources: Sequence[SourceOrder],
        mixture: Mixture,
        *,
        seed: int,
        bucket: int = 1,
        length: Callable[[Place], int] | None = None,
    ):
        self.sources, self.mixture, self.seed, self.bucket, self.length = sources, mixture, seed, bucket, length
        self.sorted_group = lru_cache(maxsize=2)(self._sorted_group)

    def place(self, position: int) -> Place:
        source, index = self.mixture.locate(position)
        return Place(source, *self.sources[source].locate(index))

    def batch(self, index: int, size: int) -> list[Place]:
        """Batch `index` of `size` samples, sorted by lane."""
        positions: Sequence[int]
        if self.bucket > 1:
            positions = self.sorted_group(index // self.bucket, size)[index % self.bucket]
        else:
            positions = range(index * size, (index + 1) * size)
        return [self.place(position) for position in sorted(positions, key=self.lane_of)]

    def lane_of(self, position: int) -> tuple[float, int]:
        source, index = self.mixture.locate(position)
        return self.sources[source].lane(index), position

    def epochs(self, position: int) -> list[float]:
        """Epochs that each source has gone through before a position."""
        consumed = self.mixture.consumed(position)
        return [int(n) / source.total for n, source in zip(consumed, self.sources, strict=True)]

    def _sorted_group(self, group: int, size: int) -> list[list[int]]:
        positions = range(group * self.bucket * size, (group + 1) * self.bucket * size)
        length = self.length
        if length is None:
            raise ValueError(f"buckets of {self.bucket} batches need the length of each sample")
        ordered = sorted(positions, key=lambda p: (length(self.place(p)), p))
        chosen = generator(self.seed, 7, group).permutation(self.bucket)
        return [ordered[i * size : (i + 1) * size] for i in chosen]
