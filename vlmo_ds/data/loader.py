"""From shards to batches: what a stage's tasks need, as tensors, in the order that order.py says."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import DataConfig, RecipeError
from vlmo_ds.data import visual_tokens
from vlmo_ds.data.masking import mask_blocks, mask_tokens
from vlmo_ds.data.order import BatchOrder, Mixture, Place, SourceOrder, generator
from vlmo_ds.data.shards import RawSample, Shard, check_names, clean_texts, is_true, list_shards
from vlmo_ds.data.storage import DataError, Storage, expand
from vlmo_ds.data.transforms import TRANSFORMS, Crops, EncodedImage, pixels
from vlmo_ds.distributed import heartbeat

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
REPLACEMENTS = 8  # tries to replace a sample that cannot be read, before giving up
CHECKED_AT_START = 256  # samples of each source


@dataclass(frozen=True)
class SampleSpec:
    """What is made of a sample."""

    image: bool
    text: bool
    mask_text: bool
    mask_image: bool
    questions: bool
    answer_texts: bool
    image_pair: bool
    label: bool
    answers: int
    classes: int
    image_size: int
    window: int
    max_text_len: int
    seed: int


def spec_for(
    reads: Collection[str],
    image_size: int,
    patch_size: int,
    max_text_len: int,
    seed: int,
    answers: int = 0,
    classes: int = 0,
) -> SampleSpec:
    """reads: as families.interface.Task.reads; answers: those that questions choose among; classes: that images are of."""
    return SampleSpec(
        image="image" in reads,
        text="text" in reads,
        mask_text="masked_text" in reads,
        mask_image="masked_image" in reads,
        questions="questions" in reads,
        answer_texts="answers" in reads,
        image_pair="image_pair" in reads,
        label="label" in reads,
        answers=answers,
        classes=classes,
        image_size=image_size,
        window=image_size // patch_size,
        max_text_len=max_text_len,
        seed=seed,
    )


def source_shards(data: DataConfig) -> list[list[Shard]]:
    """The shards of each source."""
    storage = Storage(cache_bytes=int(data.cache_size_gb * 1e9), tries=data.tries, stall_seconds=data.stall_seconds)
    if data.cache:
        storage = replace(storage, cache=Path(data.cache))
    sources = data.mixture.values()
    for index in dict.fromkeys(source.index for source in sources if source.index):
        urls = (url for source in sources if source.index == index for url in expand(source.shards))
        check_names(urls, index, storage)
    return [list_shards(source.shards, storage, source.index) for source in sources]


class BatchDataset(Dataset):
    """Item i is this rank's part of global micro-batch i. Whatever is random is a function of (seed, epoch, sample id).

    A sample that cannot be used is replaced by another of its source, chosen by its place; a batch's "replaced" holds
    (source, reason) for each.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: SampleSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        known_shards: list[list[str]] | None = None,
    ):
        """known_shards: for each source the names that its shards had when the run began, where they have moved since."""
        self.data, self.spec, self.tokenizer = data, spec, tokenizer
        self.names = list(data.mixture)
        self.shards = source_shards(data)
        if known_shards:
            pairs = zip(self.shards, known_shards, strict=True)
            self.shards = [[replace(s, known_as=n) for s, n in zip(*pair, strict=True)] for pair in pairs]
        self.transforms = [TRANSFORMS[source.transform or data.transform] for source in data.mixture.values()]
        self.crops = Crops(data.min_scale, data.flip)
        self.tokens = [source.visual_tokens or data.visual_tokens for source in data.mixture.values()]
        seeds = [spec.seed, *(stable_seed(spec.seed, number) for number in range(1, len(self.shards)))]
        self.sources = [
            SourceOrder([s.samples for s in shards], lanes=data.lanes, window=data.shuffle, seed=seed)
            for shards, seed in zip(self.shards, seeds, strict=True)
        ]
        mixture = Mixture([s.weight for s in data.mixture.values()], exact=data.mixing == "exact", seed=spec.seed)
        self.order = BatchOrder(
            self.sources, mixture, seed=spec.seed, bucket=data.length_bucketing, length=self.text_length
        )
        self.batch_size, self.global_size = batch_size, batch_size * world_size
        self.first = rank * batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor | list]:
        places = self.order.batch(index, self.global_size)[self.first : self.first + self.batch_size]
        samples: list[dict[str, Any]] = []
        replaced: list[tuple[str, str]] = []
        for place in places:
            sample, errors = self.load(place)
            samples.append(sample)
            replaced += [(self.names[place.source], error) for error in errors]
        padding = (self.tokenizer.pad_token_id or 0) if self.tokenizer is not None else 0
        return {**collate(samples, self.spec.max_text_len, padding), "replaced": replaced}

    def origins(self) -> list[visual_tokens.Origin]:
        """What the visual tokens of each source were made by. DataError where they do not fit the shards and the images."""
        size, patches = self.spec.image_size, self.spec.window**2
        pairs = zip(self.tokens, self.shards, strict=True)
        return [visual_tokens.check(folder, shards, size, patches) for folder, shards in pairs if folder]

    def made_by(self) -> str:
        """The checksum of the tokenizer that the visual tokens were made by, "" where none are read."""
        if not self.spec.mask_image:
            return ""
        made = (
            visual_tokens.file_of(folder, shards[0])
            for folder, shards in zip(self.tokens, self.shards, strict=True)
            if folder
        )
        return next((visual_tokens.opened(file).origin.tokenizer for file in made), "")

    def text_length(self, place: Place) -> int:
        """Bytes of text as the index knows them; 0 where it does not."""
        lengths = self.shards[place.source][place.shard].text_lengths
        return int(lengths[place.row]) if place.row < len(lengths) else 0

    def load(self, place: Place) -> tuple[dict[str, Any], list[str]]:
        """The sample of a place or its replacement, and why the ones before it could not be used."""
        errors: list[str] = []
        first = place
        for attempt in range(REPLACEMENTS):
            try:
                raw = self.shards[place.source][place.shard].read(place.row)
                return self.make(raw, place) | self.false_partners(raw, place), errors
            except DataError as error:
                errors.append(str(error))
                place = self.drawn(first, 4, stable_seed(*first), attempt)
        raise DataError(f"{REPLACEMENTS} samples in a row cannot be used; the first: {errors[0]}")

    def drawn(self, place: Place, *key: int) -> Place:
        """A place of the same source and epoch, drawn by a key."""
        source = self.sources[place.source]
        number = int(generator(self.spec.seed, *key).integers(source.total))
        return Place(place.source, place.epoch, *source.stored(number))

    def make(self, raw: RawSample, place: Place) -> dict[str, Any]:
        """Arrays and numbers; those of questions for each question alone, under "questions"."""
        spec, sample_id = self.spec, raw.sample_id
        rng = generator(spec.seed, 3, place.epoch, sample_id)
        out: dict[str, Any] = {"sample_id": sample_id, "image_id": raw.image_id}
        if spec.image:
            out["image"] = self.image(raw.image, raw, place.source, rng)
        if spec.mask_image:
            out["image_mask"] = mask_blocks(spec.window, self.data.mim_ratio, rng)
            if all(self.tokens):
                file = visual_tokens.file_of(self.tokens[place.source] or "", self.shards[place.source][place.shard])
                out["visual_tokens"] = visual_tokens.opened(file).of(place.row, raw)
        if spec.label:
            out["label"] = raw.label_below(spec.classes)
        if spec.questions:
            wanted = ("answers",) if spec.answer_texts else ("labels", "scores")
            entries = raw.entries("questions", ("question", *wanted))
            turn = self.turn(entries, raw, place, self.data.questions_per_image)
            out["questions"] = [self.question(entry, raw) for entry in turn]
        elif spec.image_pair:
            (sentence,) = self.turn(raw.entries("sentences", ("sentence", "label")), raw, place)
            out["image_0"], out["image_1"] = (
                self.image(raw.picture(f"{number}."), raw, place.source, rng) for number in (0, 1)
            )
            out["answers"] = int(is_true(sentence["label"]))
            out["text_ids"] = self.token_ids(self.encode(sentence["sentence"], raw))
        elif spec.text:
            encoding = self.encoded_text(raw, rng)
            ids = out["text_ids"] = self.token_ids(encoding)
            if self.data.prompt:
                out["prompt_words"] = self.prompt_words
            if spec.mask_text:
                out["text_ids_mlm"], out["text_labels_mlm"] = mask_tokens(
                    ids,
                    encoding.word_ids(),
                    probability=self.data.mlm_probability,
                    whole_word=self.data.whole_word_masking,
                    mask_id=self.needed_tokenizer.mask_token_id,
                    vocab_size=len(self.needed_tokenizer),
                    rng=rng,
                )
        return out

    def turn(self, entries: list[dict], raw: RawSample, place: Place, most: int = 1) -> list[dict]:
        """Those of a sample's questions or sentences whose turn it is, `most` or all: over the epochs each comes as often as the others."""
        count = min(most, len(entries))
        first = int(generator(self.spec.seed, 10, raw.sample_id).integers(len(entries))) + place.epoch * count
        return [entries[(first + number) % len(entries)] for number in range(count)]

    def question(self, entry: dict, raw: RawSample) -> dict[str, np.ndarray]:
        found = self.answers(entry, raw) if self.spec.answer_texts else {"vqa_targets": self.targets(entry, raw)}
        return found | {"text_ids": self.token_ids(self.encode(entry["question"], raw))}

    def targets(self, question: dict, raw: RawSample) -> np.ndarray:
        """[answers] float32: the scores of the question's labels, zero elsewhere."""
        scores = np.zeros(self.spec.answers, dtype=np.float32)
        try:
            scores[question["labels"]] = question["scores"]
        except IndexError:
            raise DataError(
                f"{raw.name}: labels {question['labels']} and scores {question['scores']} of '{question['question']}' do "
                f"not fit {self.spec.answers} answers (model.vqav2_label_size)"
            ) from None
        return scores

    def answers(self, question: dict, raw: RawSample) -> dict[str, np.ndarray]:
        """The K different answers of a question's annotators: answer_ids [K, W] int64, 0 behind a text's end, answer_lengths [K]
        int64 and answer_weights [K] float32, the share of annotators who gave each."""
        given = Counter(clean_texts(question["answers"]))
        if not given:
            raise DataError(f"{raw.name}: '{question['question']}' has no answer")
        encoded = [self.token_ids(self.encode(answer, raw)) for answer in given]
        lengths = np.array([len(ids) for ids in encoded])
        weights = np.array(list(given.values()), dtype=np.float32) / sum(given.values())
        return {"answer_ids": stacked(encoded), "answer_lengths": lengths, "answer_weights": weights}

    def image(self, data: bytes, raw: RawSample, source: int, rng: np.random.Generator) -> np.ndarray:
        try:
            return pixels(self.transforms[source](EncodedImage(data), self.spec.image_size, rng, self.crops))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{raw.name}: {error}") from None

    def encoded_text(self, raw: RawSample, rng: np.random.Generator):
        """Of one of the captions, behind the prompt."""
        captions = raw.captions
        return self.encode(f"{self.data.prompt} {captions[int(rng.integers(len(captions)))]}".strip(), raw)

    @cached_property
    def prompt_words(self) -> int:
        """Of the prompt, the start included. RecipeError where it leaves no place for a caption."""
        words = len(self.needed_tokenizer(self.data.prompt)["input_ids"]) - 1
        if words + 1 >= self.spec.max_text_len:
            raise RecipeError(
                f"data.prompt '{self.data.prompt}' has {words} words with the start, a text {self.spec.max_text_len} at most "
                "(model.max_text_len): it leaves no place for a caption"
            )
        return words

    @property
    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("texts are asked of a dataset that was made without a tokenizer")
        return self.tokenizer

    def encode(self, text: str, raw: RawSample):
        encoding = self.needed_tokenizer(text, truncation=True, max_length=self.spec.max_text_len)
        if len(encoding["input_ids"]) < 3:
            raise DataError(f"{raw.name} has an empty text after tokenisation")
        return encoding

    def token_ids(self, encoding) -> np.ndarray:
        return np.asarray(encoding["input_ids"], dtype=np.int64)

    def false_partners(self, raw: RawSample, place: Place) -> dict[str, np.ndarray]:
        """Images and texts of other samples of the source, as the reference's draw_false_image and draw_false_text."""
        out: dict[str, np.ndarray] = {}
        for kind, count in (("image", self.data.draw_false_image), ("text", self.data.draw_false_text)):
            for number in range(count):
                name = f"false_{kind}_{number}"
                key = (8 if kind == "image" else 9, place.epoch, raw.sample_id, number)
                other = self.other_sample(raw, place, key)
                rng = generator(self.spec.seed, 3, *key)
                if kind == "image":
                    out[name] = self.image(other.image, other, place.source, rng)
                else:
                    out[f"{name}_ids"] = self.token_ids(self.encoded_text(other, rng))
        return out

    def other_sample(self, raw: RawSample, place: Place, key: tuple[int, ...]) -> RawSample:
        """A sample of the source that does not show the same picture."""
        for attempt in range(REPLACEMENTS):
            drawn = self.drawn(place, *key, attempt)
            other = self.shards[drawn.source][drawn.shard].read(drawn.row)
            if other.image_id != raw.image_id:
                return other
        raise DataError(f"{raw.name}: {REPLACEMENTS} draws of another sample gave none with another picture")


class Streams(Dataset):
    """Datasets that are read in every step, by the stream's name: item i has an item of each, what is not `data`'s under the names
    <stream>/<name>. Its sample_id and image_id are those of the first."""

    def __init__(self, parts: dict[str, BatchDataset]):
        self.parts = parts

    def __getitem__(self, index: int) -> dict[str, Tensor | list]:
        batch: dict[str, Tensor | list] = {}
        replaced: list = []
        for stream, dataset in self.parts.items():
            found = dataset[index]
            replaced += [(in_stream(stream, name), reason) for name, reason in found.pop("replaced")]
            for name in ("sample_id", "image_id"):
                batch.setdefault(name, found[name])
            batch |= {in_stream(stream, name): value for name, value in found.items()}
        return {**batch, "replaced": replaced}


def in_stream(stream: str, name: str) -> str:
    return f"{stream}/{name}" if stream else name


def stacked(values: Sequence[np.ndarray], fill: int = 0, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Arrays of one number of dimensions behind each other, filled up to a shape, or to the largest of each dimension."""
    shape = shape or tuple(np.max([value.shape for value in values], axis=0))
    whole = np.full((len(values), *shape), fill, dtype=values[0].dtype)
    for row, value in zip(whole, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return whole


def stable_seed(*key: int) -> int:
    return int(generator(*key).integers(1 << 62))


def collate(samples: list[dict[str, Any]], max_text_len: int, padding: int = 0) -> dict[str, Tensor]:
    """Stacks samples, and by themselves their questions: question_image says which sample each is of, and is left out where every
    sample has one. Texts are padded with the id `padding` to the longest, rounded up to a multiple of 8 (at most
    max_text_len). Of each text there is a mask by its length: 1 = token, 0 = padding. Answers are padded with zeros to the most
    of a question and the longest."""
    batch: dict[str, Tensor] = {}
    if "questions" in samples[0]:
        counts = [len(sample["questions"]) for sample in samples]
        batch |= collate([question for sample in samples for question in sample["questions"]], max_text_len, padding)
        if counts != [1] * len(samples):
            batch["question_image"] = torch.arange(len(samples)).repeat_interleave(torch.tensor(counts))
    for key in samples[0]:
        if key == "questions":
            continue
        values: list[Any] = [sample[key] for sample in samples]
        if key.startswith(("text_", "false_text_")):
            fill = -100 if key == "text_labels_mlm" else padding
            lengths = np.array([len(value) for value in values])
            length = min(-(-int(lengths.max()) // 8) * 8, max_text_len)
            batch[key] = torch.from_numpy(stacked(values, fill, (length,)))
            if key.endswith("_ids"):
                mask = np.arange(length)[None] < lengths[:, None]
                batch[key.replace("_ids", "_masks")] = torch.from_numpy(mask.astype(np.int64))
        elif key.startswith("answer_"):
            batch[key] = torch.from_numpy(stacked(values))
        elif isinstance(values[0], int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = torch.from_numpy(np.stack(values))
    return batch


def batches(
    dataset: BatchDataset | Streams, start: int, stop: int, workers: int, prefetch: int = 4
) -> Iterator[dict[str, Tensor | list]]:
    """Batches start .. stop-1 in order, whatever the number of workers."""
    loader = DataLoader(
        Told(dataset),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=live_with_the_rank if workers else None,
    )
    return raised(iter(loader))


class Told(Dataset):
    """A dataset with the DataError of an item in its place: out of a loader process it would come as a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its subclasses

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def raised(items: Iterable) -> Iterator:
    """The items of Told, or its error."""
    for item in items:
        if isinstance(item, DataError):
            raise item
        yield item


def live_with_the_rank(worker: int) -> None:
    """Who is asked to stop asks its whole process tree: a loader process goes on until its rank ends, and no longer, even
    if it stands still (on Linux, where the kernel ends a process with its parent)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)  # the rank's, which would take this process's signals for its own
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_samples(dataset: BatchDataset) -> int:
    """Reads samples from all over the shards before training; returns how many were read.

    Raises DataError naming the first bad sample when more than max_bad_fraction of a source's are bad.
    """
    checked = 0
    for number, source in enumerate(dataset.sources):
        chosen = np.unique(np.linspace(0, source.total - 1, min(CHECKED_AT_START, source.total)).astype(np.int64))
        bad = []
        for stored in chosen:
            heartbeat.beat("looking at samples before training")
            place = Place(number, 0, *source.stored(int(stored)))
            try:
                dataset.make(dataset.shards[number][place.shard].read(place.row), place)
            except DataError as error:
                bad.append(str(error))
        if len(bad) > dataset.data.max_bad_fraction * len(chosen):
            raise DataError(
                f"{len(bad)} of {len(chosen)} samples looked at in source '{dataset.names[number]}' cannot be used "
                f"(max_bad_fraction is {dataset.data.max_bad_fraction}); the first: {bad[0]}"
            )
        checked += len(chosen)
    return checked
