"""CapFilt: captions are written for the images of a shard set, and those that do not fit their image are left out (BLIP,
arXiv:2201.12086, section 3.3).

    python -m vlmo_ds.evaluation.capfilt caption RUN --shards S --output T [--top_p 0.9] [--captions 1] [--seed 0]
    python -m vlmo_ds.evaluation.capfilt filter RUN --shards T --output U [--threshold 0.5] [--synthetic beside]

RUN is a run's directory or a stage's final folder inside it; `caption` takes the weights of the last stage that trains captions,
`filter` those of the last that trains matching. Both write a new shard set: pictures and all other members byte for byte, and in
.json `captions`, what is trained on, and `caption_entries`, every caption with its `source` (human, web, synthetic) and, once
filtered, its `score`, the probability that it belongs to the image, and whether it was `kept`. Captions of people are never left
out. A set in which nothing says where captions are from is of the web (--source). With `--synthetic instead` written captions are
kept only of images that have no other caption that fits (as arXiv:2307.10350 does), else beside them, as BLIP does.

Under a launcher (torchrun, deepspeed) the ranks share the shards. A call that was killed goes on when it is given again, and the
shards are the same, byte for byte, on any number of ranks. report.html and capfilt.json in the new set tell what became of it.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import DecodingConfig, RecipeError, number
from vlmo_ds.data.prepare import writer
from vlmo_ds.data.prepare.writer import Made, Plan, Rejected, Sample
from vlmo_ds.data.shards import RawSample, Shard, list_shards
from vlmo_ds.data.storage import DataError, is_remote, write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import meaning, runs
from vlmo_ds.evaluation.drawing import STYLE
from vlmo_ds.evaluation.report import picture
from vlmo_ds.families.finished import find_stage
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.generation.decoding import check_lengths, written
from vlmo_ds.manifest import crc32
from vlmo_ds.progress import Progress
from vlmo_ds.weights_file import WEIGHTS

SUMMARY, REPORT = "capfilt.json", "report.html"
SOURCES = HUMAN, WEB, SYNTHETIC = "human", "web", "synthetic"
SYNTHETICS = BESIDE, INSTEAD = "beside", "instead"  # whether synthetic captions are kept beside others that fit
SHOWN = 24  # examples of kept and of dropped captions in the report
BINS = 20  # of the histograms of scores


@dataclass
class Caption:
    """A text of an image; score: of its matching, None: not yet; kept: whether it is trained on; spare: it would be, but another caption
    of its image is."""

    text: str
    source: str
    score: float | None = None
    kept: bool = True
    spare: bool = False

    @property
    def fits(self) -> bool:
        return self.kept or self.spare

    def entry(self) -> dict[str, Any]:
        found: dict[str, Any] = {"caption": self.text, "source": self.source}
        if self.score is not None:
            found |= {"score": self.score, "kept": self.kept}
        return found | ({"spare": True} if self.spare else {})


def captions_of(raw: RawSample, source: str) -> list[Caption]:
    """A sample's captions, those that an earlier filter left out too. source: of those that say nothing of it. DataError where an
    entry is no caption."""

    def told(found: Any) -> str:
        return found if found in SOURCES else source

    if raw.meta.get("caption_entries"):
        entries = raw.entries("caption_entries", ("caption",))
        return [
            Caption(e["caption"], told(e.get("source")), e.get("score"), e.get("kept", True), e.get("spare") is True)
            for e in entries
        ]
    return [Caption(text, told(raw.meta.get("source"))) for text in raw.captions]


class Example(NamedTuple):
    """A caption that the report shows, and where its picture lies."""

    shard: int
    row: int
    text: str
    source: str
    score: float


@dataclass
class Tally:
    """What became of the captions of some shards."""

    seen: Counter[str] = field(default_factory=Counter)  # by source
    kept: Counter[str] = field(default_factory=Counter)
    scores: dict[str, list[int]] = field(default_factory=dict)  # by source: counts of BINS equal parts of 0 to 1
    judged: Counter[str] = field(default_factory=Counter)  # "web right kept", ..., where the truth is known
    examples: dict[str, list[Example]] = field(default_factory=lambda: {"kept": [], "dropped": []})
    images: int = 0
    images_dropped: int = 0

    def add(self, shard: int, row: int, raw: RawSample, captions: Sequence[Caption]) -> None:
        """shard, row: where the sample lies."""
        self.images += 1
        scene = meaning.scene_of(raw.meta)
        for caption in captions:
            self.seen[caption.source] += 1
            self.kept[caption.source] += caption.kept
            if scene:
                right = "right" if is_true(caption.text, scene) else "wrong"
                self.judged[f"{caption.source} {right} {'kept' if caption.fits else 'dropped'}"] += 1
            if caption.score is not None:
                bins = self.scores.setdefault(caption.source, [0] * BINS)
                bins[min(int(caption.score * BINS), BINS - 1)] += 1
                shown = self.examples["kept" if caption.fits else "dropped"]
                if not caption.spare and len(shown) < SHOWN:
                    shown.append(Example(shard, row, caption.text, caption.source, caption.score))

    def record(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "images_dropped": self.images_dropped,
            "seen": dict(self.seen),
            "kept": dict(self.kept),
            "scores": self.scores,
            "judged": dict(self.judged),
            "examples": self.examples,
        }

    def join(self, record: dict[str, Any]) -> None:
        self.images += record["images"]
        self.images_dropped += record["images_dropped"]
        for mine, name in ((self.seen, "seen"), (self.kept, "kept"), (self.judged, "judged")):
            mine.update(record[name])
        for source, bins in record["scores"].items():
            before = self.scores.get(source, [0] * BINS)
            self.scores[source] = [a + b for a, b in zip(before, bins, strict=True)]
        for name, shown in self.examples.items():
            shown += [Example(*example) for example in record["examples"][name]][: SHOWN - len(shown)]

    def truth(self) -> dict[str, dict[str, float]]:
        """By source, in percent, where the set knows the truth: right captions among those before and after; of the filter, how many
        of the dropped are wrong (precision) and how many of the wrong are dropped (recall)."""
        found = {}
        for source in sorted(self.seen):
            right, wrong = ([self.judged[f"{source} {kind} {how}"] for how in HOW] for kind in ("right", "wrong"))
            before, after, dropped = sum(right) + sum(wrong), right[0] + wrong[0], right[1] + wrong[1]
            if before:
                found[source] = {
                    "right before": 100 * sum(right) / before,
                    "right after": 100 * right[0] / max(after, 1),
                }
            if dropped:
                found[source] |= {"precision": 100 * wrong[1] / dropped, "recall": 100 * wrong[1] / max(sum(wrong), 1)}
        return found


HOW = ("kept", "dropped")


def is_true(text: str, scene: Sequence[Any]) -> bool:
    """Whether a caption names something, and nothing that is not there or not so."""
    said = meaning.read(text, scene)
    names = {(thing.colour, thing.shape) for thing in scene}
    return bool(said.things) and names.issuperset(said.things) and all(said.statements)


class Readable(NamedTuple):
    """A sample that can be used: its row, what is stored, its picture [3, S, S] uint8, its captions."""

    row: int
    raw: RawSample
    pixels: torch.Tensor
    captions: list[Caption]


class Work:
    """What one of the two commands makes of a shard. progress: the folder where it notes what became of the captions."""

    needs_caption = True

    def __init__(
        self, model: FamilyModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, source: str, progress: Path
    ):
        self.model, self.tokenizer, self.batch_size, self.source = model, tokenizer, batch_size, source
        self.progress = progress
        self.device = next(model.parameters()).device

    def of_shard(self, item: tuple[int, Shard]) -> Made:
        """Its samples in order. What became of them lies in the progress folder before the last is written."""
        number, shard = item
        tally = Tally()
        for first in range(0, shard.samples, self.batch_size):
            samples: list[Readable] = []
            for row in range(first, min(first + self.batch_size, shard.samples)):
                try:
                    samples.append(self.readable(shard, row))
                except DataError as error:
                    yield Rejected(re.sub(r"\S+\.tar(:\S+)?", "a sample", str(error)))
            captions = [sample.captions for sample in samples]
            if samples:
                self.change(samples, captions)
            for (row, raw, _, _), of_image in zip(samples, captions, strict=True):
                tally.add(number, row, raw, of_image)
                if any(caption.kept for caption in of_image):
                    yield changed(raw, of_image)
                else:
                    tally.images_dropped += 1
                    yield Rejected("no caption fits the image")
        write_atomically(tally_path(self.progress, number), json.dumps(tally.record()).encode())

    def readable(self, shard: Shard, row: int) -> Readable:
        """DataError where a sample cannot be used."""
        raw = shard.read(row)
        try:
            captions = captions_of(raw, self.source)
        except DataError:
            if self.needs_caption:
                raise
            captions = []
        return Readable(row, raw, runs.square_pixels(raw.image, self.model.config.image_size, raw.name), captions)

    def change(self, samples: Sequence[Readable], captions: list[list[Caption]]) -> None:
        """Adds captions to those of each sample, or judges them."""
        raise NotImplementedError

    def pixels(self, samples: Sequence[Readable]) -> torch.Tensor:
        return torch.stack([sample.pixels for sample in samples]).to(self.device)


class Captioner(Work):
    config: DecodingConfig
    seed: int
    needs_caption = False  # pictures alone get their first

    @torch.no_grad()
    def change(self, samples: Sequence[Readable], captions: list[list[Caption]]) -> None:
        begin, *_, end = self.tokenizer("")["input_ids"]
        ids = torch.tensor([sample.raw.image_id for sample in samples]).to(self.device)
        batch = {"image": self.pixels(samples), "image_id": ids}
        found = written(self.model, batch, [begin], end, self.config, self.seed)
        for of_image, texts in zip(captions, found, strict=True):
            known = {caption.text for caption in of_image}
            for text in self.tokenizer.batch_decode(texts, skip_special_tokens=True):
                if (text := text.strip()) and text not in known:
                    known.add(text)
                    of_image.append(Caption(text, SYNTHETIC))


class Filter(Work):
    threshold: float
    synthetic: str  # one of SYNTHETICS

    @torch.no_grad()
    def change(self, samples: Sequence[Readable], captions: list[list[Caption]]) -> None:
        judged = [(row, c) for row, of_image in enumerate(captions) for c in of_image if c.source != HUMAN]
        if not judged:
            return
        pixels = self.pixels(samples)
        texts = runs.tokenised([c.text for _, c in judged], self.tokenizer, self.model.config.max_text_len)
        for part in torch.arange(len(judged)).split(self.batch_size):
            batch = {name: value.to(self.device) for name, value in texts.batch(part).items()}
            batch["image"] = pixels[[judged[i][0] for i in part.tolist()]]
            for i, chance in zip(part.tolist(), self.model(batch, "match").sigmoid().tolist(), strict=True):
                caption = judged[i][1]
                caption.score = round(chance, 4)
                caption.kept, caption.spare = caption.score >= self.threshold, False
        for of_image in captions if self.synthetic == INSTEAD else ():
            if any(c.kept for c in of_image if c.source != SYNTHETIC):
                for caption in of_image:
                    caption.spare = caption.kept and caption.source == SYNTHETIC
                    caption.kept &= not caption.spare


def changed(raw: RawSample, captions: Sequence[Caption]) -> Sample:
    """The sample with these captions in its .json."""
    meta = {name: value for name, value in raw.meta.items() if name not in ("caption", "captions", "caption_entries")}
    kept = [caption.text for caption in captions if caption.kept]
    meta |= {"captions": kept, "caption_entries": [caption.entry() for caption in captions]}
    members = {name: data for name, data in raw.fields.items() if name not in ("json", "txt", "caption")}
    members["json"] = json.dumps(meta, ensure_ascii=False).encode()
    return Sample({"__key__": raw.key, **members}, len(kept))  # type: ignore[dict-item]  # a key is a text


# ---- a whole set ----


def tally_path(progress: Path, number: int) -> Path:
    return progress / f"{number:06d}.tally.json"


def write(
    work: Work, shards: Sequence[Shard], output: Path, about: dict[str, Any], collector: Collector, overwrite: bool
):
    """Writes the new set, shards dealt to the ranks; a summary on rank 0."""
    items = [(number, shard) for number, shard in enumerate(shards)]
    plan = Plan("capfilt", [(shard.url, shard.samples, about) for shard in shards], work.of_shard, items_per_shard=1)
    partial = output.with_name(output.name + writer.PARTIAL)
    if any(other != plan.items for other in collector.each_rank(plan.items)):
        raise RecipeError("the ranks see different shards or weights: is a copy still under way?")
    _, problem = collector.attempt_on_rank0(lambda: begin(partial, output, plan, overwrite), *ERRORS)
    if problem:
        raise RecipeError(problem)
    done = {n for n, _ in items if writer.read_report(partial, plan.prefix, n) and has_tally(partial, n)}
    done = collector.from_rank0(done)
    mine = [item for item in items if item[0] not in done][collector.rank :: collector.world_size]
    bar = Progress(str(output), len(items), "shards", done=len(done)) if collector.rank == 0 else None
    for item in mine:
        writer.write_shard(work.of_shard, partial, plan.prefix, item[0], item[0], [item])
        if bar:
            bar.advance(collector.world_size)
    collector.barrier()
    if bar:
        bar.close()
    _, problem = collector.attempt_on_rank0(lambda: finish(partial, output, plan, shards, about), *ERRORS)
    if problem:
        raise RecipeError(problem)


HELD: list[Any] = []  # locks, until the process ends
ERRORS = (ValueError, OSError)


def begin(partial: Path, output: Path, plan: Plan, overwrite: bool) -> None:
    writer.check_target(output, overwrite)
    HELD.append(writer.begin(partial, plan, 1))


def has_tally(partial: Path, number: int) -> bool:
    return tally_path(partial / writer.PROGRESS, number).exists()


def finish(partial: Path, output: Path, plan: Plan, shards: Sequence[Shard], about: dict[str, Any]) -> None:
    reports, tally = {}, Tally()
    for n, _ in enumerate(plan.items):
        report = writer.read_report(partial, plan.prefix, n)
        if report is None:
            raise RecipeError(f"{partial}: shard {n} was not written; give the same command again")
        reports[n] = report
        tally.join(json.loads(tally_path(partial / writer.PROGRESS, n).read_text()))
    numbers = {name: value for name, value in tally.record().items() if name != "examples"}
    numbers |= {"truth": tally.truth(), **about}
    plan.extra = {SUMMARY: runs.as_json(numbers), REPORT: page(tally, shards, about).encode()}
    writer.finish(partial, output, plan, reports)
    print(writer.summary(output, reports))
    for source in sorted(tally.seen):
        print(f"  {source}: {tally.seen[source]} captions, {tally.kept[source]} kept")
    for source, found in tally.truth().items():
        print(f"  {source}, by the truth: " + ", ".join(f"{name} {value:.1f}%" for name, value in found.items()))
    print(f"  report: {output / REPORT}")


def page(tally: Tally, shards: Sequence[Shard], about: dict[str, Any]) -> str:
    """The report. shards: of the set that was read."""
    rows = "".join(
        f"<tr><td>{html.escape(source)}<td>{tally.seen[source]}<td>{tally.kept[source]}"
        f"<td>{100 * tally.kept[source] / tally.seen[source]:.1f}%"
        for source in sorted(tally.seen)
    )
    parts = [f"<h2>Captions</h2><table><tr><th>source<th>seen<th>kept<th>share{rows}</table>"]
    parts.append(f"<p>{tally.images} images, {tally.images_dropped} of them left out with all of their captions.</p>")
    if truth := tally.truth():
        parts.append("<h2>Against the truth</h2><table>")
        for source, found in truth.items():
            parts += [f"<tr><td>{html.escape(source)}<td>{name}<td>{value:.1f}%" for name, value in found.items()]
        parts.append("</table>")
    for source, bins in sorted(tally.scores.items()):
        parts.append(f"<h2>Scores of {html.escape(source)} captions, from 0 to 1</h2>{bars(bins)}")
    for name, shown in tally.examples.items():
        if shown:
            parts.append(f"<h2>{name.capitalize()}</h2>")
            parts += [
                f'<div class="query">{picture(shards[e.shard].read(e.row).image)}<div>{e.score:.2f} {html.escape(e.source)}<br><b>{html.escape(e.text)}</b></div></div>'
                for e in shown
            ]
    told = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in about.items())
    body = "\n".join(parts)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>CapFilt</title><style>{STYLE}</style>"
        f"<h1>CapFilt</h1>{body}<h2>Settings</h2><table class=facts>{told}</table>"
    )


def bars(counts: Sequence[int], width: int = 400, height: int = 90) -> str:
    """A histogram as SVG."""
    most, each = max(max(counts), 1), width / len(counts)
    drawn = "".join(
        f'<rect x="{i * each:.1f}" y="{height - n / most * height:.1f}" width="{each - 1:.1f}" height="{n / most * height:.1f}">'
        f"<title>{i / len(counts):.2f} to {(i + 1) / len(counts):.2f}: {n}</title></rect>"
        for i, n in enumerate(counts)
    )
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{drawn}</svg>'


# ---- the command ----


def refuse(shards: Sequence[Shard], output: Path, what: str) -> None:
    """RecipeError for an output inside its input, and for a set that was filtered before."""
    target = output.resolve()
    for folder in {Path(shard.url).resolve().parent for shard in shards if not is_remote(shard.url)}:
        if target == folder or target.is_relative_to(folder) or folder.is_relative_to(target):
            raise RecipeError(f"--output: {output} is not apart from the shards in {folder}: name another folder")
    for shard in shards if what == "filter" else ():
        entries = shard.read(0).meta.get("caption_entries", []) if shard.samples else []
        if any("score" in entry for entry in entries):
            raise RecipeError(f"--shards: {shard.url} was filtered already: name the shards that it was made of")


def join_ranks() -> Collector:
    """Of the ranks that a launcher has started, each on its GPU where there are any; files alone are shared."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # a rank may wait for another's last shard
    return Collector()


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("caption", "writes captions"), ("filter", "leaves captions out that do not fit")):
        one = commands.add_parser(name, help=about, description=about)
        one.add_argument("run", type=Path, help="a run's directory, or checkpoints/<stage>/final inside it")
        runs.choose_weights(one)
        one.add_argument("--shards", nargs="+", required=True)
        one.add_argument("--output", type=Path, required=True, help="folder of the new set")
        one.add_argument("--source", choices=[HUMAN, WEB], default=WEB, help="of captions that say nothing of it")
        one.add_argument("--batch_size", type=number(int, 1), default=32, help="images at a time")
        one.add_argument("--overwrite", action="store_true", help="replace a finished set")
        if name == "filter":
            one.add_argument(
                "--threshold", type=number(float, 0), default=0.5, help="least probability of a match that is kept"
            )
            one.add_argument(
                "--synthetic",
                choices=SYNTHETICS,
                default=BESIDE,
                help="written captions are kept beside others of their image that fit, or only instead of them, where there is none",
            )
            continue
        one.add_argument("--captions", type=number(int, 1), default=1, help="of each image")
        one.add_argument(
            "--top_p", type=number(float, 0), default=0.9, help=DecodingConfig.model_fields["top_p"].description
        )
        one.add_argument("--min_length", type=number(int, 0), default=0)
        one.add_argument("--max_length", type=number(int, 0), default=0)
        one.add_argument("--seed", type=number(int, 0), default=0)
    return parser.parse_args(argv)


def main() -> None:
    args = parsed()
    shards = list_shards(args.shards)
    refuse(shards, args.output, args.command)
    if args.command == "filter" and args.threshold > 1:
        raise RecipeError(f"--threshold is {args.threshold}; accepted: a probability, from 0 to 1")
    collector = join_ranks()
    call = "caption_step" if args.command == "caption" else "match"
    _, _, weights = find_stage(args.run, call, args.weights)
    _, _, model, tokenizer = runs.open_run(args.run, call, args.weights)
    if not torch.cuda.is_available():
        model.double()  # the number of threads shows in the last digits of float32, and so could that of ranks in a score's
    model.eval()
    about = {"command": args.command, "run": str(args.run), "weights": f"{crc32(weights / WEIGHTS):08x}"}
    names = {"filter": ("threshold", "synthetic"), "caption": ("captions", "top_p", "min_length", "max_length", "seed")}
    about |= {name: getattr(args, name) for name in (*names[args.command], "source", "batch_size")}
    progress = args.output.with_name(args.output.name + writer.PARTIAL) / writer.PROGRESS
    settings = (model, tokenizer, args.batch_size, args.source, progress)
    work: Work
    if args.command == "filter":
        work = Filter(*settings)
        work.threshold, work.synthetic = args.threshold, args.synthetic
    else:
        work = Captioner(*settings)
        try:
            work.config = DecodingConfig(
                method="sample",
                top_p=args.top_p,
                num_return_sequences=args.captions,
                min_length=args.min_length,
                max_length=args.max_length,
            )
        except ValidationError as error:
            told = error.errors()[0]
            where = ".".join(map(str, told["loc"])).replace("num_return_sequences", "captions")
            raise RecipeError(f"{f'--{where}: ' if where else ''}{told['msg'].removeprefix('Value error, ')}") from None
        longest = model.config.max_text_len
        check_lengths([0], work.config, args.max_length or longest, longest)
        work.seed = args.seed
    write(work, shards, args.output, about, collector, args.overwrite)


if __name__ == "__main__":
    sys.exit(runs.command(main))
