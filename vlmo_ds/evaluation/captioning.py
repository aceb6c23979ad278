"""Captions for held-out images, and their scores.

    python -m vlmo_ds.evaluation.captioning RUN [--shards PATTERN ...] [--method greedy|beam|sample] [--beams N] [--top_p P] ...
        [--captions FILE] [--output FILE]

RUN is a run's directory (the weights of its last stage that trains captions are used) or a stage's final folder inside it.
BLEU, ROUGE-L and CIDEr are pycocoevalcap's (the extra `captioning`); METEOR and SPICE, with --meteor and --spice, need Java.
Sets of the synthetic world are judged by what their captions mean as well (evaluation/meaning.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import CaptioningConfig, DecodingConfig, RecipeError, number
from vlmo_ds.data.shards import RawSample, list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.synthetic import Thing
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import meaning, runs
from vlmo_ds.evaluation.runs import Place, places_of, square_pixels
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.generation.decoding import check_lengths, written
from vlmo_ds.progress import progress

# pycocoevalcap's, and round and curly brackets, which PTBTokenizer writes as -LRB- and the like
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "(", ")", "{", "}"])
EXTRA = "pip install 'vlmo_ds[captioning]'"


@dataclass
class Captioned:
    """One image: its captions by people, what the world has in it (nothing of a photograph), and those written for it."""

    image_id: int | str  # as the set has it
    key: int
    encoded: bytes  # of those that the report shows
    references: list[str]
    scene: tuple[Thing, ...]
    written: list[str]


def samples_of_images(config: CaptioningConfig, scored: bool) -> list[list[Place]]:
    """Where the samples of every image lie, in the order in which the images come. scored: each has to have a caption."""
    found: dict[int, list[Place]] = {}
    for shard, row in places_of(list_shards(config.shards)):
        heartbeat.beat("reading the held-out set")
        raw = shard.read(row)
        _ = raw.captions if scored else []
        found.setdefault(raw.image_id, []).append((shard, row))
    return list(found.values())


def read(raw: RawSample) -> tuple[dict[str, bytes], list[dict]]:
    """Picture and captions. DataError where there is no caption to compare with."""
    return {"image": raw.image}, [{"caption": text} for text in raw.captions]


def has_captions(raw: RawSample) -> bool:
    try:
        return bool(raw.captions)
    except DataError:
        return False


def prompt_ids(config: DecodingConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(config.prompt)["input_ids"][:-1]


def check(config: CaptioningConfig, longest: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """RecipeError where prompt and lengths do not fit. longest: text of the model, in tokens."""
    check_lengths(prompt_ids(config, tokenizer), config, config.max_length or longest, longest)


@torch.no_grad()
def evaluate(
    model: FamilyModel,
    config: CaptioningConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
    scored: bool = True,
) -> list[Captioned]:
    """All images with their captions, in the set's order, on every rank; each rank writes those of its share.

    scored: captions by people are needed. DataError naming the first image that has none.
    """
    model.eval()
    check(config, model.config.max_text_len, tokenizer)
    device = next(model.parameters()).device
    begin, end = prompt_ids(config, tokenizer), tokenizer("")["input_ids"][-1]
    images = samples_of_images(config, scored)
    texts = partial(tokenizer.batch_decode, skip_special_tokens=True)
    left_out = "" if config.keep_prompt else texts([begin])[0]

    def describe(places: list[Place]) -> Captioned:
        samples = [shard.read(row) for shard, row in places]
        raw = samples[0]
        references = [text for one in samples for text in (one.captions if scored or has_captions(one) else [])]
        return Captioned(
            raw.meta.get("image_id", raw.key), raw.image_id, raw.image, references, meaning.scene_of(raw.meta), []
        )

    mine = list(range(collector.rank, len(images), collector.world_size))
    done: list[tuple[int, Captioned]] = []
    batches = [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]
    for rows in progress(batches, "writing captions", unit="batches", silent=collector.rank > 0):
        heartbeat.beat("writing captions")
        found = [describe(images[row]) for row in rows]
        pixels = [square_pixels(one.encoded, model.config.image_size, str(one.image_id)) for one in found]
        batch = {
            "image": torch.stack(pixels).to(device),
            "image_id": torch.tensor([one.key for one in found]).to(device),
        }
        for one, ids in zip(found, written(model, batch, begin, end, config, config.seed), strict=True):
            one.written = [text.removeprefix(left_out).strip() for text in texts(ids)]
        for row, one in zip(rows, found, strict=True):
            done.append((row, one if row < config.gallery else replace(one, encoded=b"")))
    every = [pair for part in collector.each_rank(done) for pair in part]
    return [one for _, one in sorted(every, key=lambda pair: pair[0])]


# ---- scores ----


def java_runs() -> bool:
    try:
        return subprocess.run(["java", "-version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def words_of(texts: Sequence[str], java: bool) -> tuple[list[str], str]:
    """(the texts as words with a space between, without punctuation; the name of what cut them)."""
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        with contextlib.suppress(OSError):  # it writes into its package's folder
            found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
            if len(found) == len(texts):
                return [found[i][0] for i in range(len(texts))], "PTBTokenizer (Java)"
    from nltk.tokenize import TreebankWordTokenizer

    cutter = TreebankWordTokenizer()
    cut = [[word for word in cutter.tokenize(text.lower()) if word not in PUNCTUATION] for text in texts]
    return [" ".join(words) for words in cut], "NLTK's Treebank tokenizer"


def missing_package() -> str:
    """The first package that scores need and this machine has not; "" where it has all."""
    return next((name for name in ("pycocoevalcap", "nltk") if find_spec(name) is None), "")


def check_scorers(wanted: Sequence[str]) -> None:
    """RecipeError where METEOR or SPICE is wanted and cannot be had."""
    if wanted and (missing := missing_package()):
        raise RecipeError(f"{wanted[0]} needs {missing}, which is not installed: {EXTRA}")
    if wanted and not java_runs():
        raise RecipeError(f"{wanted[0]} runs in Java, and no `java` runs on this machine")


def scores(captioned: Sequence[Captioned], wanted: Sequence[str] = ()) -> tuple[dict[str, float], str]:
    """(scores in percent of the first caption of every image, what they were taken with). wanted: METEOR, SPICE beside the
    others."""
    check_scorers(wanted)
    if missing := missing_package():
        return {}, f"BLEU, ROUGE-L and CIDEr are left out, as {missing} is not installed: {EXTRA}"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    texts = [text for one in captioned for text in (one.written[0], *one.references)]
    cut, how = words_of(texts, java_runs())
    words = iter(cut)
    ours, theirs = {}, {}
    for i, one in enumerate(captioned):
        ours[i] = [next(words)]
        theirs[i] = [next(words) for _ in one.references]
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    found = {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, start=1)}
    found["ROUGE-L"] = 100 * float(Rouge().compute_score(theirs, ours)[0])
    found["CIDEr"] = 100 * float(Cider().compute_score(theirs, ours)[0])
    for name in wanted:
        if name == "METEOR":
            from pycocoevalcap.meteor.meteor import Meteor as Scorer
        else:
            from pycocoevalcap.spice.spice import Spice as Scorer
        found[name] = 100 * float(Scorer().compute_score(theirs, ours)[0])
    return found, f"words by {how}"


def overall(captioned: Sequence[Captioned], wanted: Sequence[str] = ()) -> tuple[dict[str, float], str]:
    """(all scores, a line about how they were taken)."""
    found, how = scores(captioned, wanted)
    if all(one.scene for one in captioned):
        found = meaning.judge([one.written[0] for one in captioned], [one.scene for one in captioned]) | found
    if not any(one.scene for one in captioned):
        same = sum(letters(one.written[0]) in map(letters, one.references) for one in captioned)
        found["word by word one of its own"] = 100 * same / max(len(captioned), 1)
    different = len({one.written[0] for one in captioned})
    return found | {"images": len(captioned), "different captions": different}, how


def letters(text: str) -> list[str]:
    """Words alone: a tokenizer may set spaces and marks otherwise."""
    return re.findall(r"\w+", text.lower())


def table(metrics: dict[str, float], how: str) -> str:
    lines = [f"captions of {metrics['images']:.0f} images ({how})"]
    return "\n".join(lines + [f"{name:24}{value:8.2f}" for name, value in metrics.items() if name != "images"])


def server_json(captioned: Sequence[Captioned]) -> bytes:
    """What COCO's server takes: one caption for every image."""
    rows = [{"image_id": one.image_id, "caption": one.written[0]} for one in captioned]
    return json.dumps(rows, ensure_ascii=False).encode()


def main() -> None:
    parser = runs.parser(__doc__)
    fields = DecodingConfig.model_fields
    parser.add_argument("--method", choices=get_args(fields["method"].annotation))
    for name, kind, least in (
        ("beams", int, None),
        ("length_penalty", float, -5),
        ("temperature", float, None),
        ("top_k", int, 0),
        ("top_p", float, None),
        ("min_length", int, 0),
        ("max_length", int, 0),
        ("repetition_penalty", float, None),
        ("num_return_sequences", int, None),
        ("seed", int, 0),
        ("batch_size", int, None),
    ):
        about = (CaptioningConfig.model_fields[name].description or "").replace("%", "%%")
        parser.add_argument(f"--{name}", type=number(kind, least), help=about)
    parser.add_argument("--prompt", help=fields["prompt"].description)
    kept = CaptioningConfig.model_fields["keep_prompt"].description
    parser.add_argument("--keep_prompt", action=argparse.BooleanOptionalAction, help=kept)
    parser.add_argument("--captions", type=Path, metavar="FILE", help="write the captions as COCO's server takes them")
    parser.add_argument("--unscored", action="store_true", help="images without captions by people: only write")
    parser.add_argument("--meteor", action="store_true", help="METEOR as well; needs Java")
    parser.add_argument("--spice", action="store_true", help="SPICE as well; needs Java")
    args = parser.parse_args()
    wanted = [name.upper() for name in ("meteor", "spice") if getattr(args, name)]
    check_scorers(wanted)
    if args.unscored and (args.output or not args.captions):
        raise RecipeError("--unscored writes no scores: name a file for the captions with --captions, and no --output")
    runs.check_outputs(output=args.output, captions=args.captions)
    _, recipe, model, tokenizer = runs.open_run(args.run, "caption_step", args.weights)
    given = {name: getattr(args, name) for name in CaptioningConfig.model_fields if hasattr(args, name)}
    config = CaptioningConfig.of(settings_for(recipe.captioning, args.method), "captioning", **given)
    captioned = evaluate(model, config, tokenizer, model.collector, scored=not args.unscored)
    if args.captions:
        write_atomically(args.captions, server_json(captioned))
        print(f"{args.captions}: captions of {len(captioned)} images")
    if args.unscored:
        return
    metrics, how = overall(captioned, wanted)
    print(table(metrics, how))
    if args.output:
        rows = [{"image_id": one.image_id, "captions": one.written, "references": one.references} for one in captioned]
        write_atomically(
            args.output, runs.as_json({**metrics, "scored with": how, "settings": config.model_dump(), "images": rows})
        )


def settings_for(settings: CaptioningConfig | None, method: str | None) -> CaptioningConfig | None:
    """The recipe's, without those that belong to another method than the one asked for."""
    if settings is None or method in (None, settings.method):
        return settings
    kept = settings.model_dump(
        exclude={"method", "beams", "length_penalty", "temperature", "top_k", "top_p", "num_return_sequences"}
    )
    return CaptioningConfig(**kept)


if __name__ == "__main__":
    sys.exit(runs.command(main))
