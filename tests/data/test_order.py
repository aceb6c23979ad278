"""The order of samples as a pure function of seed and position."""

import random
from collections import Counter

import numpy as np
import pytest

from vlmo_ds.data.order import BLOCK, BatchOrder, Mixture, SourceOrder

COUNTS = [5, 30, 1, 17, 11]
EVERY = Counter({(s, r): 1 for s, n in enumerate(COUNTS) for r in range(n)})


def one_source(counts, lanes=4, window=8, seed=1, **changes):
    return BatchOrder(
        [SourceOrder(counts, lanes=lanes, window=window, seed=seed)],
        Mixture([1], exact=False, seed=seed),
        seed=seed,
        **changes,
    )


@pytest.mark.parametrize("lanes, window", [(1, 100), (4, 3), (7, 5), (8, 1), (60, 7), (1000, 4)])
def test_every_epoch_holds_every_sample_once(lanes, window):
    order = SourceOrder(COUNTS, lanes=lanes, window=window, seed=1)
    for epoch in range(3):
        found = [order.locate(i) for i in range(epoch * 64, (epoch + 1) * 64)]
        assert {at for at, _, _ in found} == {epoch}
        assert Counter((shard, row) for _, shard, row in found) == EVERY


def test_order_depends_on_seed_and_position_only():
    def first(seed):
        order = one_source(COUNTS, seed=seed)
        return [order.batch(i, 8) for i in range(20)]

    assert first(1) == first(1) != first(2)
    assert one_source(COUNTS).batch(13, 8) == first(1)[13]  # any position, without the ones before


def test_a_rank_stays_on_its_lanes():
    order = one_source([100] * 8, lanes=8, window=10, seed=0)
    shards = {place.shard for i in range(10) for place in order.batch(i, 16)[:4]}  # the first of four ranks
    assert len(shards) == 2


def mixture_of(weights, exact, sizes=(90, 31, 12), **changes):
    sources = [SourceOrder([n], lanes=4, window=8, seed=7 + i) for i, n in enumerate(sizes)]
    return BatchOrder(sources, Mixture(weights, exact=exact, seed=5), seed=5, **changes)


@pytest.mark.parametrize("exact", [True, False])
def test_sources_of_a_mixture_go_through_their_own_epochs(exact):
    order = mixture_of([5, 2, 1], exact)
    places = [order.place(i) for i in range(800)]
    for source, size in enumerate((90, 31, 12)):
        seen = [p for p in places if p.source == source]
        whole = len(seen) // size
        for epoch in range(whole):
            part = seen[epoch * size : (epoch + 1) * size]
            assert {p.epoch for p in part} == {epoch} and {p.row for p in part} == set(range(size))
        assert order.epochs(800)[source] == len(seen) / size


def test_exact_proportions_hold_in_every_run():
    order = mixture_of([5, 2, 1], True)
    for batch in range(40):
        assert Counter(p.source for p in order.batch(batch, 16)) == {0: 10, 1: 4, 2: 2}
    assert len({tuple(order.place(8 * i + j).source for j in range(8)) for i in range(40)}) > 10


def test_random_proportions_follow_the_weights():
    mixture = Mixture([5, 2, 1.5], exact=False, seed=3)
    shares = mixture.consumed(20 * BLOCK + 77) / (20 * BLOCK + 77)
    assert shares == pytest.approx(np.array([5, 2, 1.5]) / 8.5, abs=0.002)
    per_batch = [int(mixture.consumed((i + 1) * 100)[0] - mixture.consumed(i * 100)[0]) for i in range(200)]
    assert np.std(per_batch) == pytest.approx((100 * 5 / 8.5 * 3.5 / 8.5) ** 0.5, rel=0.25)  # binomial


@pytest.mark.parametrize("exact", [True, False])
def test_any_position_without_the_ones_before(exact):
    order = mixture_of([5, 2, 1], exact)
    there = {i: order.place(i) for i in range(3 * BLOCK - 50, 3 * BLOCK + 50)}
    shuffled = list(there)
    random.Random(0).shuffle(shuffled)
    fresh = mixture_of([5, 2, 1], exact)
    assert {i: fresh.place(i) for i in shuffled} == there
    assert [order.mixture.locate(i)[1] for i in range(2000) if order.mixture.locate(i)[0] == 1] == list(
        range(int(order.mixture.consumed(2000)[1]))
    )


def test_bucketing_sorts_within_a_group_and_loses_nothing():
    def length(place):
        return place.row * 7919 % 101

    order = one_source([400], lanes=4, window=400, bucket=5, length=length)
    plain = one_source([400], lanes=4, window=400)
    for group in range(4):
        batches = [order.batch(group * 5 + i, 20) for i in range(5)]
        same = [plain.batch(group * 5 + i, 20) for i in range(5)]
        assert {p for b in batches for p in b} == {p for b in same for p in b}
        longest = [max(map(length, b)) for b in batches]
        assert sum(longest) < 0.75 * sum(max(map(length, b)) for b in same)
    assert [max(map(length, order.batch(i, 20))) for i in range(20)] != sorted(
        max(map(length, order.batch(i, 20))) for i in range(20)
    )
