"""Texts written by a model: greedy, beam search, sampling; each word once, with a cache of keys and values.

A model that writes captions has the call caption_image, which gives what is looked at in every step (its memory) once for each image, and
caption_step, which gives the logits of the next word. Weights are whole on the rank, and no collective is called: ranks may
stop at different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmo_ds.config import DecodingConfig, RecipeError
from vlmo_ds.distributed.rows import gumbel_noise, mix
from vlmo_ds.families.step import FamilyModel

NEVER = -1e9  # a score that no text has; float32, as in transformers' beam search, whose results these are

Step = Callable[[Tensor, int], Tensor]  # (newest words [R, L], words before them) -> logits [R, V]


class KeyValueCache:
    """Keys and values of the words so far, of all layers of a decoder; room for `length` words."""

    def __init__(self, layers: int, length: int):
        self.length = length
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.filled = [0] * layers

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends a layer's keys and values of the newest words, [R, H, L, D/H]; all of the layer's."""
        kept = self.kept[layer]
        if kept is None:
            rows, heads, _, width = key.shape
            kept = key.new_empty(rows, heads, self.length, width), value.new_empty(rows, heads, self.length, width)
            self.kept[layer] = kept
        first, last = self.filled[layer], self.filled[layer] + key.shape[2]
        for whole, new in zip(kept, (key, value), strict=True):
            whole[:, :, first:last] = new
        self.filled[layer] = last
        return kept[0][:, :, :last], kept[1][:, :, :last]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of row rows[i]."""
        for kept, filled in zip(self.kept, self.filled, strict=True):
            for whole in kept or ():
                whole[:, :, :filled] = whole[rows, :, :filled]


class KeyedNoise:
    """Adds Gumbel noise, so that the largest score is a sample (the Gumbel-max trick). The noise of a word is a function of
    (seed, image, number of the caption, position, word): the same captions in any batch and on any rank."""

    def __init__(self, seed: int, image_id_R: Tensor, number_R: Tensor):
        self.seed = seed
        self.row_R = mix(mix(image_id_R) ^ number_R)

    def __call__(self, ids_RL: Tensor, scores_RV: Tensor) -> Tensor:
        row = mix(self.row_R ^ ids_RL.shape[1])
        words = torch.arange(scores_RV.shape[1], device=scores_RV.device)
        return scores_RV + gumbel_noise(self.seed, row, words).to(scores_RV.dtype)


def written(
    model: FamilyModel,
    batch: dict[str, Tensor],
    prompt_ids: Sequence[int],
    end: int,
    config: DecodingConfig,
    seed: int = 0,
    calls: tuple[str, str] = ("caption_image", "caption_step"),
) -> list[list[list[int]]]:
    """For each image of a batch num_return_sequences texts, best first: lists of ids, from the prompt's first to the last before
    the end word.

    batch: image [B, 3, S, S], image_id [B] int64, and what else the first call reads; prompt_ids: words that every text begins
    with, the start word first; calls: of the model, as caption_image and caption_step.
    """
    length = config.max_length or model.config.max_text_len
    check_lengths(prompt_ids, config, length, model.config.max_text_len)
    memory = model(batch, calls[0])
    image_id = batch["image_id"]
    images, texts = len(image_id), config.texts_at_once
    cache = KeyValueCache(model.cached_layers, length)  # type: ignore[arg-type]  # of models that write

    def step(new_RL: Tensor, first: int) -> Tensor:
        given: dict[str, Any] = {"text_ids": new_RL, "first": first, "memory": memory, "cache": cache}
        return model(given, calls[1]).float()

    ids_RL = torch.tensor(prompt_ids, device=image_id.device).expand(images * texts, -1)
    processors = processors_of(config, end, seed, image_id, len(prompt_ids), model.unwritten)
    if config.method == "beam":
        found_BKL = beam_search(step, cache, ids_RL, processors, texts, length, end, config.length_penalty)
        found_BKL = found_BKL[:, : config.num_return_sequences]
    else:
        found_BKL = best_words(step, ids_RL, processors, length, end).unflatten(0, (images, texts))
    return [[up_to(row, end, len(prompt_ids)) for row in rows] for rows in found_BKL.tolist()]


def check_lengths(prompt_ids: Sequence[int], config: DecodingConfig, length: int, longest: int) -> None:
    """RecipeError where the prompt, the shortest and the longest text do not fit each other."""
    if length > longest:
        raise RecipeError(f"max_length is {length}, the model's texts have {longest} words at most")
    if config.min_length > length:
        raise RecipeError(f"min_length is {config.min_length}, above the longest text of {length} words")
    if len(prompt_ids) >= length:
        raise RecipeError(
            f"prompt '{config.prompt}' has {len(prompt_ids)} words with the start, a text {length} at most (max_length; the "
            f"model's {longest}): it leaves no place for a word"
        )


def processors_of(
    config: DecodingConfig, end: int, seed: int, image_id: Tensor, prompt: int, unwritten: list[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """What happens to scores before the best is taken, in transformers' order; noise comes last."""
    found: list[Any] = []
    if unwritten:
        found.append(SuppressTokensLogitsProcessor(unwritten, device=str(image_id.device)))
    if config.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.min_length > prompt:
        found.append(MinLengthLogitsProcessor(config.min_length, end, device=str(image_id.device)))
    if config.method == "sample":
        if config.temperature != 1.0:
            found.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            found.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            found.append(TopPLogitsWarper(config.top_p))
        number_R = torch.arange(config.num_return_sequences, device=image_id.device).repeat(len(image_id))
        found.append(KeyedNoise(seed, image_id.repeat_interleave(config.num_return_sequences), number_R))
    return LogitsProcessorList(found)


def best_words(
    step: Step, ids_RL: Tensor, processors: Callable[[Tensor, Tensor], Tensor], length: int, end: int
) -> Tensor:
    """The word with the highest score after all before it, until every text has its end or `length` words, [R, L']."""
    done_R = torch.zeros(len(ids_RL), dtype=torch.bool, device=ids_RL.device)
    new_RL, first = ids_RL, 0
    while ids_RL.shape[1] < length and not bool(done_R.all()):
        word_R = processors(ids_RL, step(new_RL, first)).argmax(1)
        word_R = torch.where(done_R, end, word_R)
        first, new_RL = ids_RL.shape[1], word_R[:, None]
        ids_RL = torch.cat((ids_RL, new_RL), dim=1)
        done_R = done_R | (word_R == end)
    return ids_RL


def beam_search(
    step: Step,
    cache: KeyValueCache,
    ids_RL: Tensor,
    processors: Callable[[Tensor, Tensor], Tensor],
    beams: int,
    length: int,
    end: int,
    length_penalty: float,
) -> Tensor:
    """[B, beams, L'] of prompts [B * beams, L]: the most likely texts found, best first, with transformers' rules: a text's
    score is its log-likelihood over (its new words ** length_penalty); an image is done when its best running text cannot
    come before the worst of its finished ones."""
    prompt = ids_RL.shape[1]
    running = torch.full((len(ids_RL) // beams, beams, length), end, device=ids_RL.device)
    running[:, :, :prompt] = ids_RL.unflatten(0, (-1, beams))
    score = torch.zeros(running.shape[:2], device=ids_RL.device)
    score[:, 1:] = NEVER  # the first step goes on from one beam: the others are the same
    finished, finished_score = running.clone(), torch.full_like(score, NEVER)
    is_finished = torch.zeros_like(score, dtype=torch.bool)
    open_B1 = torch.ones(len(running), 1, dtype=torch.bool, device=ids_RL.device)  # a better text may still come
    among_best = torch.arange(2 * beams, device=ids_RL.device) < beams
    images = torch.arange(len(running), device=ids_RL.device)[:, None]
    new_RL, first = ids_RL, 0
    for place in range(prompt, length):
        logits = step(new_RL, first)
        logprob_RV = processors(running[:, :, :place].flatten(0, 1), logits.log_softmax(1))
        vocabulary = logprob_RV.shape[1]
        total = (logprob_RV.unflatten(0, (-1, beams)) + score[:, :, None]).flatten(1)
        best, index = total.topk(2 * beams)  # twice as many as go on: so many may end here
        beam, word = index // vocabulary, index % vocabulary
        candidates = running[images, beam]
        candidates[:, :, place] = word
        ends = (word == end) | (place + 1 == length)

        score, chosen = (best + ends * NEVER).topk(beams)
        running = candidates[images, chosen]
        ended = best / (place + 1 - prompt) ** length_penalty + (~open_B1) * NEVER + ~(ends & among_best) * NEVER
        finished_score, kept = torch.cat((finished_score, ended), dim=1).topk(beams)
        finished = torch.cat((finished, candidates), dim=1)[images, kept]
        is_finished = torch.cat((is_finished, ends & among_best), dim=1)[images, kept]

        worst = torch.where(is_finished, finished_score.min(1, keepdim=True).values, NEVER)
        possible = score[:, :1] / (place + 1 - prompt) ** length_penalty
        open_B1 = open_B1 & (possible > worst).any(1, keepdim=True)
        if not bool(open_B1.any()) or bool(ends.all()):
            break
        cache.reorder((images * beams + beam[images, chosen]).flatten())
        new_RL, first = running[:, :, place].flatten()[:, None], place
    return finished


def up_to(ids: list[int], end: int, prompt: int) -> list[int]:
    """The ids before the end word, which the prompt may hold."""
    return ids[: ids.index(end, prompt)] if end in ids[prompt:] else ids
