"""A page about a shard set: counts, distributions, duplicates, and samples as the model sees them.

python -m vlmo_ds.data.inspect SHARDS --output page.html

Exit status: 2 where nothing can be trained on the set.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import DataConfig, Transform
from vlmo_ds.data.index import TEXT_EXTENSIONS, is_read
from vlmo_ds.data.loader import BatchDataset, spec_for
from vlmo_ds.data.order import Place, generator
from vlmo_ds.data.shards import RawSample, Shard, list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.tokenizer import load_tokenizer, train_tokenizer
from vlmo_ds.data.transforms import TRANSFORMS, EncodedImage
from vlmo_ds.progress import progress

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; color: #1c2733; padding: 0 1rem }
h2 { margin-top: 2.2rem } table { border-collapse: collapse } td { padding: .25rem .9rem; border-bottom: 1px solid #dde3ea }
td:last-child { text-align: right } .row { display: flex; flex-wrap: wrap; gap: 1.4rem } figure { margin: 0; width: 17rem }
.sheet figure { width: 11.5rem } figcaption { font-size: 13px; overflow-wrap: anywhere } b { color: #cf222e }
svg text { font: 11px system-ui, sans-serif; fill: #5b6876 } img { max-width: 100% }
"""
SHOWN_DUPLICATES, SHOWN_FAULTS = 12, 20


@dataclass
class Findings:
    """What some samples hold."""

    samples: int = 0
    bytes: int = 0
    extensions: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    hashes: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # -> (url, row)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.samples += other.samples
        self.bytes += other.bytes
        self.extensions.update(other.extensions)
        for name in ("widths", "heights", "words", "captions", "faults"):
            getattr(self, name).extend(getattr(other, name))
        for key, places in other.hashes.items():
            self.hashes[key] += places

    def look_at(self, raw: RawSample, url: str, row: int) -> tuple[bool, bool]:
        """(whether there is an image, whether there is a text). ValueError for what cannot be used."""
        if not any(map(is_read, raw.fields)):
            raise DataError(
                f"{raw.name} holds no image and no text under a name that is read; found .{', .'.join(raw.fields)} (the "
                "extension begins at the first dot)"
            )
        self.bytes += sum(map(len, raw.fields.values()))
        self.extensions.update(raw.fields.keys())
        encoded = pictures(raw)
        for data in encoded:
            image = EncodedImage(data)
            self.hashes[difference_hash(image)].append((url, row))
            self.widths.append(image.width)
            self.heights.append(image.height)
        expected = not encoded or {"txt", "caption"} & raw.fields.keys() or {"caption", "captions"} & raw.meta.keys()
        found = raw.asked or (raw.captions if expected else [])
        if found:
            self.captions.append(len(found))
            self.words += [len(text.split()) for text in found]
        return bool(encoded), bool(found) or "label" in raw.meta


def pictures(raw: RawSample) -> list[bytes]:
    """Every image of a sample that is read: NLVR2 has two, 0.png and 1.png."""
    return [data for name, data in raw.fields.items() if is_read(name) and name not in TEXT_EXTENSIONS]


def difference_hash(image: EncodedImage) -> str:
    """64 bits: whether each of 8 x 8 cells is brighter than its right neighbour. Copies in other sizes share them."""
    grey = np.asarray(image.resized(9, 8).convert("L"), dtype=np.int16)
    bits = grey[:, 1:] > grey[:, :-1]
    if not bits.any():  # a flat picture says nothing by its edges
        return hashlib.blake2b(grey.tobytes(), digest_size=8).hexdigest()
    return np.packbits(bits).tobytes().hex()


def look_at_shard(job: tuple[Shard, Sequence[int]]) -> Findings:
    shard, rows = job
    found = Findings()
    alone: tuple[dict[str, int], dict[str, int]] = {}, {}  # images without a text, texts without an image: key -> row
    whole = 0
    for row in rows:
        found.samples += 1
        try:
            raw = shard.read(row)
            image, text = found.look_at(raw, shard.url, row)
        except ValueError as error:
            found.faults.append(f"{shard.url}, sample {row}: {error}")
            continue
        if image and text:
            whole += 1
        else:
            alone[text][raw.key] = row
    for row in torn(*alone, whole):
        found.faults.append(f"{shard.url}, sample {row}: its image and its text do not lie side by side")
    return found


def torn(images: Mapping[str, int], texts: Mapping[str, int], whole: int) -> list[int]:
    """Rows that are halves of samples: those of one key, and where both kinds are there but nothing whole, all."""
    keys = images.keys() & texts.keys() if whole else images.keys() | texts.keys()
    return sorted(half[key] for half in (images, texts) for key in keys if key in half) if images and texts else []


def chosen_rows(shards: Sequence[Shard], most: int) -> list[tuple[Shard, list[int]]]:
    """About `most` samples, evenly spread (0: all)."""
    total = sum(shard.samples for shard in shards)
    stride = max(1, -(-total // most)) if most else 1
    jobs, first = [], 0
    for shard in shards:
        rows = list(range(-first % stride, shard.samples, stride))
        first += shard.samples
        if rows:
            jobs.append((shard, rows))
    return jobs


def bars(title: str, values: Sequence[float], unit: str, count: int = 24, width: int = 270, height: int = 130) -> str:
    """An SVG histogram up to the 99.5th percentile, with the median in its caption."""
    if not len(values):
        return ""
    whole = all(float(v).is_integer() for v in values[:1000])
    top = float(np.percentile(values, 99.5, method="higher" if whole else "linear"))
    low = float(min(values))
    cells = int(min(count, top - low + 1)) if whole else count
    counts, edges = np.histogram(np.clip(values, low, top), bins=max(1, cells), range=(low, max(top, low + 1e-9)))
    step = width / len(counts)
    parts = [f'<svg width="{width}" height="{height + 18}" role="img" aria-label="{html.escape(title)}">']
    for i, n in enumerate(counts):
        tall = n / counts.max() * height
        parts.append(
            f'<rect x="{i * step:.1f}" y="{height - tall:.1f}" width="{step * 0.88:.1f}" height="{tall:.1f}" fill="#0969da">'
            f"<title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {n}</title></rect>"
        )
    parts.append(f'<text x="0" y="{height + 14}">{low:.4g}</text>')
    parts.append(f'<text x="{width}" y="{height + 14}" text-anchor="end">{top:.4g} {unit}</text></svg>')
    return f"<figure>{''.join(parts)}<figcaption>{html.escape(title)}, median {np.median(values):.4g}</figcaption></figure>"


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(image: Image.Image | None, caption: str) -> str:
    picture = f'<img src="{data_uri(image)}">' if image else ""
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def contact_sheet(
    shards: Sequence[Shard], jobs: Sequence[tuple[Shard, Sequence[int]]], args: argparse.Namespace
) -> str:
    """Samples after augmentation; words that are masked are red, with what stands in their place."""
    places = [(shard, row) for shard, rows in jobs for row in rows]
    places = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(args.sheet, len(places))).astype(int))]
    raws = []
    for shard, row in places:
        try:
            raws.append((shard, row, shard.read(row)))
        except DataError:
            continue
    words = [text for *_, raw in raws for text in readable_captions(raw)]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(words or ["none"], 2000)
    number = {shard.url: i for i, shard in enumerate(shards)}
    data = DataConfig(shards=args.shards, index=args.index, transform=args.transform)

    @lru_cache
    def dataset(*reads: str) -> BatchDataset:
        spec = spec_for(reads, args.image_size, 16, args.max_text_len, args.seed)
        return BatchDataset(data, spec, tokenizer, rank=0, world_size=1, batch_size=1)

    figures = []
    for shard, row, raw in raws:
        name = f"<br><small>{html.escape(Path(shard.url).name)}:{html.escape(raw.key)}</small>"
        place = Place(0, 0, number[shard.url], row)
        try:
            if not readable_captions(raw):  # questions, sentences about two images, or a class
                rng = generator(args.seed, 3, 0, raw.sample_id)
                shown = [TRANSFORMS[args.transform](EncodedImage(d), args.image_size, rng) for d in pictures(raw)]
                asked = html.escape(" / ".join(raw.asked[:3]) or str(raw.meta.get("class", "")))
                figures += [figure(image, asked + name) for image in shown]
                continue
            sample = dataset("text", "masked_text", *(["image"] if pictures(raw) else [])).make(raw, place)
        except ValueError as error:
            figures.append(figure(None, html.escape(str(error))))
            continue
        image = Image.fromarray(np.asarray(sample["image"]).transpose(1, 2, 0)) if "image" in sample else None
        figures.append(figure(image, masked_words(sample, tokenizer) + name))
    return "".join(figures)


def masked_words(sample: Mapping, tokenizer: PreTrainedTokenizerBase) -> str:
    words = ""
    for original, given, label in zip(
        sample["text_ids"], sample["text_ids_mlm"], sample["text_labels_mlm"], strict=True
    ):
        token = html.escape(tokenizer.convert_ids_to_tokens(int(original)))
        shown = html.escape(tokenizer.convert_ids_to_tokens(int(given)))
        words += f" <b>{token} &rarr; {shown}</b>" if label != -100 else f" {token}"
    return words


def readable_captions(raw: RawSample) -> list[str]:
    try:
        return raw.captions
    except DataError:
        return []


def duplicates(shards: Sequence[Shard], found: Findings) -> tuple[int, str]:
    """(pictures beyond the first of their group, the largest groups as figures)."""
    groups = sorted((g for g in found.hashes.values() if len(g) > 1), key=len, reverse=True)
    by_url = {shard.url: shard for shard in shards}
    figures = []
    for group in groups[:SHOWN_DUPLICATES]:
        url, row = group[0]
        image = EncodedImage(pictures(by_url[url].read(row))[0])
        names = ", ".join(f"{Path(u).name}:{r}" for u, r in group[:4]) + (" ..." if len(group) > 4 else "")
        picture = image.resized(160, max(1, round(160 * image.height / image.width)))
        figures.append(figure(picture, f"{len(group)} times: {html.escape(names)}"))
    return sum(len(g) - 1 for g in groups), "".join(figures)


def page(args: argparse.Namespace) -> tuple[str, Findings]:
    """The page, and what it was made of."""
    shards = list_shards(args.shards, index=args.index)
    jobs = chosen_rows(shards, args.samples)
    found = Findings()
    with ProcessPoolExecutor(max(1, args.processes), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for part in progress(pool.map(look_at_shard, jobs), "inspect", len(jobs), "shards"):
            found.add(part)
    copies, copy_figures = duplicates(shards, found)
    total = sum(shard.samples for shard in shards)
    facts = {
        "shards": f"{len(shards):,}",
        "samples": f"{total:,}",
        "samples looked at": f"{found.samples:,}",
        "of these unusable": f"{len(found.faults):,}",
        "captions": f"{sum(found.captions):,}",
        "bytes": f"{found.bytes:,}",
        "members": ", ".join(f".{name} {n:,}" for name, n in found.extensions.most_common()),
        "pictures that look like an earlier one": f"{copies:,}",
    }
    table = "".join(f"<tr><td>{key}</td><td>{html.escape(value)}</td></tr>" for key, value in facts.items())
    aspects = [w / h for w, h in zip(found.widths, found.heights, strict=True)]
    charts = (
        bars("width", found.widths, "px")
        + bars("height", found.heights, "px")
        + bars("width / height", aspects, "")
        + bars("words in a caption", found.words, "words")
        + bars("captions of a sample", found.captions, "captions")
    )
    faults = "".join(f"<li>{html.escape(fault)}</li>" for fault in found.faults[:SHOWN_FAULTS])
    sections = {
        "Distributions": f'<div class="row">{charts}</div>',
        f"Samples after {args.transform}, with masked words": f'<div class="row sheet">{contact_sheet(shards, jobs, args)}</div>',
        "Pictures that occur more than once": f'<div class="row sheet">{copy_figures}</div>' if copies else "",
        "Samples that cannot be used": f"<ul>{faults}</ul>" if faults else "",
    }
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    title = html.escape(" ".join(args.shards))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"{head}<h1>{title}</h1><table>{table}</table>{body}</html>", found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="folders, tar files, URLs; {000..009} and * are expanded")
    parser.add_argument("--index", help="index file, for shards that have none beside them")
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument(
        "--samples", type=int, default=20000, help="look at about so many; 0: all (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=int, default=40, help="samples on the contact sheet (default: %(default)s)")
    parser.add_argument("--transform", choices=get_args(Transform), default="square_transform_randaug")
    parser.add_argument("--image_size", type=int, default=224, help="pixels per side (default: %(default)s)")
    parser.add_argument("--max_text_len", type=int, default=40, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", help="Hugging Face name, folder or vocab.txt; default: trained on the samples shown"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        text, found = page(args)
        write_atomically(args.output, text.encode(errors="replace"))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    if found.faults:
        hopeless = len(found.faults) == found.samples
        print(
            f"{'error' if hopeless else 'warning'}: {len(found.faults)} of {found.samples} samples looked at cannot be "
            f"used; the first: {found.faults[0]}",
            file=sys.stderr,
        )
        return 2 if hopeless else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
