"""Masks for masked language modelling and masked image modelling, drawn from a given random generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

IGNORE = -100


def mask_tokens(
    ids: Sequence[int] | np.ndarray,
    word_of: Sequence[int | None],
    *,
    probability: float,
    whole_word: bool,
    mask_id: int,
    vocab_size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking (arXiv:1810.04805, appendix A.1), by whole words as in the reference.

    word_of: the word each token belongs to, None for special tokens. Words are taken in random order until
    max(1, round(tokens * probability)) tokens are covered; a word that would go past is left out. 80% of the covered
    tokens become mask_id, 10% a random id, 10% stay. Returns (input ids, labels with -100 where not covered), int64.
    """
    ids = np.asarray(ids, dtype=np.int64)
    words: dict[int, list[int]] = {}
    for position, word in enumerate(word_of):
        if word is not None:
            words.setdefault(word if whole_word else position, []).append(position)
    budget = max(1, round(len(ids) * probability))
    covered: list[int] = []
    groups = list(words.values())
    for g in rng.permutation(len(groups)):
        if len(covered) + len(groups[g]) <= budget:
            covered += groups[g]
    if not covered and groups:  # every word is longer than the budget: take part of one, so that there is a label
        longer = groups[int(rng.integers(len(groups)))]
        first = int(rng.integers(len(longer) - budget + 1))  # any part: a script without spaces has long words
        covered = longer[first : first + budget]
    inputs, labels = ids.copy(), np.full_like(ids, IGNORE)
    for position in sorted(covered):
        labels[position] = ids[position]
        draw = rng.random()
        if draw < 0.8:
            inputs[position] = mask_id
        elif draw < 0.9:
            inputs[position] = rng.integers(vocab_size)
    return inputs, labels


def mask_blocks(window: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """BEiT's blockwise masking (arXiv:2106.08254, algorithm 1): [window * window] bool, round(ratio * patches) true.

    Blocks of random size and aspect ratio (0.3 to 1/0.3) are added until the next one would go past the number; the
    rest is filled with single patches, so that every image has the same number of masked patches.
    """
    total = round(ratio * window * window)
    mask: np.ndarray = np.zeros((window, window), dtype=bool)
    smallest = min(16, max(1, total // 2))
    for _ in range(64):
        room = total - int(mask.sum())
        if room < smallest:
            break
        area = rng.uniform(smallest, room)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= window and 0 < width <= window):
            continue
        top, left = rng.integers(window - height + 1), rng.integers(window - width + 1)
        block = mask[top : top + height, left : left + width]
        if block.size - int(block.sum()) <= room:
            block[:] = True
    mask = mask.ravel()
    free = np.flatnonzero(~mask)
    mask[rng.permutation(free)[: total - int(mask.sum())]] = True
    return mask
