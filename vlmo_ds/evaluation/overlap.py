"""Whether held-out shards hold pictures that a run trains on: of some samples, by their bytes.

The index tells how long a sample and its text are; only training samples that are as long are read and compared. Remote shards are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmo_ds.data.shards import Shard, offsets
from vlmo_ds.data.storage import DataError, is_remote
from vlmo_ds.distributed import heartbeat

LOOKED_AT, CANDIDATES = 64, 16  # held-out samples, and training samples as long as one of them


def lengths_of(shard: Shard) -> np.ndarray:
    """[samples] int64: bytes of each sample and of its text as one number."""
    texts = shard.text_lengths.astype(np.int64)
    return (np.diff(offsets(shard)).astype(np.int64) << 16) + texts


def overlap(held_out: Sequence[Shard], training: Sequence[Shard]) -> tuple[int, int]:
    """(held-out samples whose picture was found in the training shards, as many as were looked at)."""
    own = [shard for shard in held_out if not is_remote(shard.url) and shard.samples]
    theirs = [shard for shard in training if not is_remote(shard.url) and shard.samples]
    total = sum(shard.samples for shard in own)
    if not own or not theirs:
        return 0, 0
    ends = np.cumsum([shard.samples for shard in own])
    own_lengths, lengths = ([lengths_of(shard) for shard in shards] for shards in (own, theirs))
    shared = looked_at = 0
    for number in np.unique(np.linspace(0, total - 1, min(LOOKED_AT, total)).astype(np.int64)):
        heartbeat.beat("comparing held-out with training pictures")
        place = int(np.searchsorted(ends, number, side="right"))
        shard, row = own[place], int(number - (ends[place] - own[place].samples))
        try:
            picture = shard.read(row).image
        except DataError:
            continue
        looked_at += 1
        length = own_lengths[place][row]
        candidates = [
            (of, int(at)) for of, values in zip(theirs, lengths, strict=True) for at in np.flatnonzero(values == length)
        ]
        step = max(1, len(candidates) // CANDIDATES)
        shared += any(is_picture(of, at, picture) for of, at in candidates[::step][:CANDIDATES])
    return shared, looked_at


def is_picture(shard: Shard, row: int, picture: bytes) -> bool:
    try:
        return shard.read(row).image == picture
    except DataError:
        return False
