"""Turns datasets into shards: python -m vlmo_ds.data.prepare NAME --help"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmo_ds.data.prepare import sources
from vlmo_ds.data.prepare.writer import ShardSetWriter
from vlmo_ds.data.shards import DataError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m vlmo_ds.data.prepare", description=__doc__)
    names = top.add_subparsers(dest="name", required=True, metavar="NAME")

    def dataset(name: str, about: str) -> argparse.ArgumentParser:
        sub = names.add_parser(name, help=about, description=about)
        sub.add_argument("--output", type=Path, required=True, help="folder for the shards")
        sub.add_argument("--samples_per_shard", type=positive, default=1000, help="default: %(default)s")
        sub.add_argument("--overwrite", action="store_true", help="replace a finished shard set")
        return sub

    sub = dataset("karpathy", "COCO or Flickr30k with Karpathy's split file")
    sub.add_argument("--dataset", choices=["coco", "flickr30k"], required=True)
    sub.add_argument("--root", type=Path, required=True, help="the download: images and karpathy/dataset_<name>.json")
    sub.add_argument("--split", required=True, help="train, restval, val, test, or several joined by +")
    sub = dataset("nlvr1", "Cornell NLVR v1, sentences labelled true as captions")
    sub.add_argument("--root", type=Path, required=True, help="folder with <split>.json and <split>_images.tar")
    sub.add_argument("--split", default="dev", help="dev, hidden, or several joined by + (default: %(default)s)")
    sub = dataset("text", "plain text files, one paragraph a line")
    sub.add_argument("--input", type=Path, nargs="+", required=True, help="text files")
    sub.add_argument("--words", type=positive, default=32, help="words per sample at most (default: %(default)s)")
    sub = dataset("synthetic", "the built-in world: folders train, test and text under --output")
    sub.add_argument("--train", type=positive, default=16000, help="training scenes (default: %(default)s)")
    sub.add_argument("--test", type=positive, default=256, help="held-out scenes (default: %(default)s)")
    sub.add_argument("--text", type=positive, default=16000, help="sentences of the text corpus (default: %(default)s)")
    sub.add_argument("--image_size", type=positive, default=96, help="pixels per side (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return top


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(text)


def prepare(args: argparse.Namespace) -> None:
    def writer(folder: Path = args.output, prefix: str = args.name) -> ShardSetWriter:
        return ShardSetWriter(folder, prefix=prefix, samples_per_shard=args.samples_per_shard, overwrite=args.overwrite)

    if args.name == "karpathy":
        with writer(prefix=args.dataset) as w:
            sources.karpathy(w, args.root, args.dataset, args.split.split("+"))
    elif args.name == "nlvr1":
        with writer() as w:
            sources.nlvr1(w, args.root, args.split.split("+"))
    elif args.name == "text":
        with writer() as w:
            sources.text(w, args.input, args.words)
    else:
        for split in ("train", "test"):
            with writer(args.output / split, split) as w:
                sources.synthetic_pairs(w, split, args.train, args.test, args.seed, args.image_size)
        with writer(args.output / "text", "text") as w:
            sources.synthetic_text(w, args.text, args.seed)


def main() -> int:
    try:
        prepare(parser().parse_args())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
