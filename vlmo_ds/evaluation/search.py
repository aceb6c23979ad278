"""Searches a folder of images by text or by an image, with an exported model.

    python -m vlmo_ds.evaluation.search --model DIR --images FOLDER "a dog on a beach" [--image FILE] [--rerank K]

DIR is what `python -m vlmo_ds.interop.export` writes. The images are encoded once, into an index beside them; a search that
was interrupted goes on from there, and images that are new or have changed are added. Every query gets a row in a contact
sheet (--output, .html or .png).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmo_ds.config import RecipeError, number
from vlmo_ds.data.meta import is_unicode, printable
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.data.transforms import EncodedImage
from vlmo_ds.families import FAMILIES
from vlmo_ds.families.interface import Family
from vlmo_ds.progress import progress

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
INDEX = ".vlmo_ds_index"
PART = 256  # images that are written to the index at a time
THUMBNAIL = 160


class Query(NamedTuple):
    """What is searched for: a text, or an image's file."""

    text: str = ""
    image: Path | None = None

    @property
    def title(self) -> str:
        return self.text or printable(f"like {self.image}")


class Hit(NamedTuple):
    file: Path
    score: float


class Index:
    """Features of a folder's images, in parts of which each is written in one rename."""

    def __init__(self, images: Path, folder: Path, model: str):
        self.images = images
        self.folder = folder / hashlib.blake2b(model.encode(), digest_size=6).hexdigest()
        self.known: dict[str, Tensor] = {}  # "name|size|time of change" -> [D]
        for part in sorted(self.folder.glob("part-*.safetensors")):
            with safe_open(part, "pt") as data:
                keys = json.loads(data.metadata()["keys"])
                self.known |= dict(zip(keys, data.get_tensor("features"), strict=True))

    def files(self) -> dict[Path, str]:
        """The folder's images and the keys that the index knows them by."""
        found = (p for p in self.images.rglob("*") if p.suffix.lower() in ENDINGS and INDEX not in p.parts)
        return {file: self.key(file) for file in sorted(found) if file.is_file()}

    def key(self, file: Path) -> str:
        status = file.stat()
        return f"{file.relative_to(self.images)}|{status.st_size}|{status.st_mtime_ns}"

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"part-{len(list(self.folder.glob('part-*.safetensors'))):06d}.safetensors"
        temporary = part.with_name(part.name + ".tmp")
        save_file({"features": features.contiguous()}, temporary, metadata={"keys": json.dumps(list(keys))})
        temporary.replace(part)
        self.known |= dict(zip(keys, features, strict=True))

    def features(self, files: Mapping[Path, str]) -> tuple[list[Path], Tensor]:
        """(files that could be encoded, [I, D])."""
        usable = [(file, self.known[key]) for file, key in files.items() if key in self.known]
        if not usable:
            raise RecipeError(f"--images: none of the {len(files)} images in {self.images} can be read")
        return [file for file, _ in usable], torch.stack([feature for _, feature in usable])


@torch.no_grad()
def build(index: Index, files: Mapping[Path, str], model: Any, processor: Any, batch: int) -> int:
    """Encodes the images that the index does not have; returns how many. Images that cannot be read are named."""
    missing = [file for file, key in files.items() if key not in index.known]
    done = 0
    waiting: list[tuple[Path, Tensor]] = []
    for start in progress(range(0, len(missing), batch), "indexing", unit="batches", silent=not missing):
        readable, values = [], []
        for file in missing[start : start + batch]:
            try:
                values.append(processor.image_processor(file)["pixel_values"][0])
                readable.append(file)
            except (ValueError, OSError) as error:
                print(f"left out: {printable(str(file))}: {error}", file=sys.stderr)
        if readable:
            features = model.get_image_features(torch.stack(values).to(model.device)).float().cpu()
            waiting += zip(readable, features, strict=True)
        if waiting and (len(waiting) >= PART or start + batch >= len(missing)):
            index.add([files[file] for file, _ in waiting], torch.stack([feature for _, feature in waiting]))
            done += len(waiting)
            waiting = []
    return done


@torch.no_grad()
def search(
    query: Query,
    files: Sequence[Path],
    features: Tensor,
    model: Any,
    processor: Any,
    count: int,
    rerank: int = 0,
) -> list[Hit]:
    """The best images; for a text the `rerank` best candidates are scored again by the matching head."""
    if query.image is not None:
        wanted = model.get_image_features(processor.image_processor(query.image)["pixel_values"].to(model.device))
        scores = features @ wanted[0].float().cpu()
    else:
        text = {name: value.to(model.device) for name, value in processor(text=query.text).items()}
        scores = model.contrast_scale * features @ model.get_text_features(**text)[0].float().cpu()
    order = scores.argsort(descending=True, stable=True)
    if rerank and query.image is None:
        first, rest = order[:rerank], order[rerank:]
        odds = []
        for rows in first.split(16):
            pictures = torch.cat([processor.image_processor(files[int(i)])["pixel_values"] for i in rows])
            repeated = {name: value.expand(len(rows), -1) for name, value in text.items()}
            odds.append(model.match(pixel_values=pictures.to(model.device), **repeated).float().cpu())
        scores[first] += torch.cat(odds)
        order = torch.cat((first[scores[first].argsort(descending=True, stable=True)], rest))
    return [Hit(files[int(i)], float(scores[i])) for i in order[:count]]


def thumbnail(file: Path) -> Image.Image:
    whole = Image.fromarray(EncodedImage(file.read_bytes()).decode())
    return ImageOps.pad(whole, (THUMBNAIL, THUMBNAIL), color="white")


def as_html(found: Sequence[tuple[Query, list[Hit]]], images: Path) -> bytes:
    rows = []
    for query, hits in found:
        cells = []
        for hit in hits:
            buffer = io.BytesIO()
            thumbnail(hit.file).save(buffer, "JPEG", quality=85)
            data = base64.b64encode(buffer.getvalue()).decode()
            name = html.escape(printable(str(hit.file.relative_to(images))))
            cells.append(
                f'<figure><img alt="{name}" src="data:image/jpeg;base64,{data}"><figcaption>{hit.score:.2f} {name}'
                "</figcaption></figure>"
            )
        rows.append(f"<h2>{html.escape(query.title)}</h2><div>{''.join(cells)}</div>")
    style = (
        "body{font:15px system-ui,sans-serif;margin:2rem}div{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;"
        f"width:{THUMBNAIL}px}}figcaption{{font-size:12px;overflow-wrap:anywhere;color:#5b6876}}"
    )
    return f"<!doctype html><meta charset='utf-8'><title>search</title><style>{style}</style>{''.join(rows)}".encode()


def as_png(found: Sequence[tuple[Query, list[Hit]]]) -> bytes:
    columns, header = max(len(hits) for _, hits in found), 24
    row = header + THUMBNAIL + 8
    sheet = Image.new("RGB", (columns * (THUMBNAIL + 8), len(found) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (query, hits) in enumerate(found):
        draw.text((4, line * row + 6), query.title, fill="black")
        for place, hit in enumerate(hits):
            sheet.paste(thumbnail(hit.file), (place * (THUMBNAIL + 8), line * row + header))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def check_arguments(args: argparse.Namespace) -> None:
    """RecipeError for what cannot be searched for, in or with, before a model is loaded."""
    for text in args.query:
        if not text.strip() or not is_unicode(text):
            raise RecipeError(f"query: {printable(text)!r}; accepted: a text that is not empty, in UTF-8")
    if not args.images.is_dir():
        raise RecipeError(f"--images: {args.images} is no folder")
    if args.output.suffix.lower() not in (".html", ".png"):
        raise RecipeError(f"--output: {args.output}; accepted: a file that ends in .html or .png")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise RecipeError(f"--output: {args.output} cannot be written: {args.output.parent} is no folder, or it is one")
    family, tasks = trained_for(args.model)
    contrast, pairs = family.giving("encode_text"), family.giving("match")
    if not set(tasks) & set(contrast):
        raise RecipeError(
            f"--model: {args.model} was trained for {', '.join(tasks)}; a search needs {' or '.join(contrast)}"
        )
    if args.rerank and not set(tasks) & set(pairs):
        raise RecipeError(
            f"--rerank: {args.model} has no head that judges pairs ({' or '.join(pairs)}); it was trained for {', '.join(tasks)}"
        )
    for file in args.image:
        try:
            EncodedImage(file.read_bytes()).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"--image: {printable(str(file))}: {reason}; accepted: an image's file") from None


def trained_for(model: Path) -> tuple[Family, list[str]]:
    """The family of an exported model and the tasks that it was trained for. RecipeError where there is no such model."""
    try:
        config = json.loads((model / "config.json").read_bytes())
        if config["model_type"] in FAMILIES and (model / "model.safetensors").is_file():
            return FAMILIES[config["model_type"]], [str(task) for task in config["tasks"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise RecipeError(f"--model: {model} holds no exported model; write one with python -m vlmo_ds.interop.export")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    queries = [Query(text=text) for text in args.query] + [Query(image=file) for file in args.image]
    weights = (args.model / "model.safetensors").stat()
    index = Index(
        args.images,
        args.index or args.images / INDEX,
        f"{args.model.resolve()}|{weights.st_size}|{weights.st_mtime_ns}",
    )
    files = index.files()
    if not files:
        raise RecipeError(f"--images: {args.images} holds no image; accepted: {', '.join(sorted(ENDINGS))}")

    from transformers import (  # seconds, once the arguments are checked
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
    )

    trained_for(args.model)[0].huggingface()
    model = AutoModelForZeroShotImageClassification.from_pretrained(args.model).eval()
    if torch.cuda.is_available():
        model.cuda()
    processor = AutoProcessor.from_pretrained(args.model)
    try:
        added = build(index, files, model, processor, args.batch_size)
    except OSError as error:
        raise RecipeError(
            f"the index cannot be written to {index.folder} ({error.strerror}): name a folder with --index"
        ) from None
    usable, features = index.features(files)
    print(f"{len(usable)} images, {added} of them newly indexed in {index.folder}")
    found = []
    for query in queries:
        hits = search(query, usable, features, model, processor, args.count, args.rerank)
        found.append((query, hits))
        print(f"{query.title}:")
        for hit in hits:
            print(f"  {hit.score:8.3f}  {printable(os.path.relpath(hit.file, args.images))}")
    if found:
        write_atomically(
            args.output, as_png(found) if args.output.suffix.lower() == ".png" else as_html(found, args.images)
        )
        print(f"contact sheet: {args.output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="*", help="texts to search for; none: only the index is built")
    parser.add_argument("--model", type=Path, required=True, help="an exported model's folder")
    parser.add_argument(
        "--images", type=Path, required=True, help="a folder of images, searched through with its folders"
    )
    parser.add_argument("--image", type=Path, action="append", default=[], help="search for images like this one")
    parser.add_argument("--count", type=number(int), default=8, help="images shown per query (default: %(default)s)")
    parser.add_argument(
        "--rerank", type=number(int, 0), default=0, help="candidates that the matching head scores again"
    )
    parser.add_argument("--index", type=Path, help=f"where the index is kept (default: {INDEX} in the images' folder)")
    parser.add_argument(
        "--batch_size", type=number(int), default=32, help="images per forward pass (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("search.html"), help="contact sheet (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
