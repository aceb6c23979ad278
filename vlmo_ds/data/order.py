"""The order of samples: a pure function of (seed, position), the same for any number of ranks and loader workers.

In each epoch the shards are shuffled and laid end to end, and the line is cut into `lanes` equal parts. A lane goes
through its part in windows that are shuffled within. Sample j of the stream is the next sample of lane j mod lanes. A
batch is sorted by lane, so a rank that takes a contiguous part of every batch stays on its own lanes and shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a pure function of its key."""
    return np.random.default_rng([k & 0xFFFFFFFFFFFFFFFF for k in key])


class SampleOrder:
    """Where each sample of the endless stream comes from.

    counts: samples per shard; lanes: parts each epoch is cut into (fewer if there are fewer samples); window: samples
    that are shuffled together within a lane.
    """

    def __init__(self, counts: Sequence[int], *, lanes: int, window: int, seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.lanes = min(lanes, self.total)
        self.window = window
        self.seed = seed
        self.shard_line = lru_cache(maxsize=4)(self._shard_line)
        self.window_order = lru_cache(maxsize=4 * self.lanes)(self._window_order)

    def batch(self, index: int, size: int) -> list[tuple[int, int, int]]:
        """Batch `index` of `size` samples as (epoch, shard, row), sorted by lane."""
        stream = np.arange(index * size, (index + 1) * size)
        lane, position = stream % self.lanes, stream // self.lanes
        return [self.locate(int(lane[i]), int(position[i])) for i in np.lexsort((position, lane))]

    def locate(self, lane: int, position: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of the sample at a position of a lane, counted from the start of the run."""
        first = lane * self.total // self.lanes
        length = (lane + 1) * self.total // self.lanes - first
        epoch, offset = divmod(position, length)
        window, within = divmod(offset, self.window)
        size = min(self.window, length - window * self.window)
        place = first + window * self.window + int(self.window_order(epoch, lane, window, size)[within])
        shards, starts = self.shard_line(epoch)
        i = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(shards[i]), place - int(starts[i])

    def _shard_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the place on the line where each begins."""
        shards = generator(self.seed, 1, epoch).permutation(len(self.counts))
        return shards, np.concatenate(([0], self.counts[shards].cumsum()[:-1]))

    def _window_order(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return generator(self.seed, 2, epoch, lane, window).permutation(size)
