"""Turns datasets into shards: python -m vlmo_ds.data.prepare NAME --help"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vlmo_ds.data.prepare import emoji, folder, nlvr1, sources, stamps, table
from vlmo_ds.data.prepare.writer import Plan, write_set
from vlmo_ds.data.storage import DataError

Plans = Callable[[argparse.Namespace], dict[Path, Plan]]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m vlmo_ds.data.prepare", description=__doc__)
    names = top.add_subparsers(dest="name", required=True, metavar="NAME")

    def dataset(
        name: str, about: str, plan: Callable[[argparse.Namespace], Plan] | None, root: str = ""
    ) -> argparse.ArgumentParser:
        sub = names.add_parser(name, help=about, description=about)
        sub.add_argument("--output", type=Path, required=True, help="folder for the shards")
        if root:
            sub.add_argument("--root", type=Path, required=True, help=root)
        sub.add_argument("--samples_per_shard", type=positive, default=1000, help="default: %(default)s")
        cores = len(os.sched_getaffinity(0))
        sub.add_argument(
            "--processes", type=positive, default=cores, help="default: the cores of this machine, %(default)s"
        )
        sub.add_argument("--overwrite", action="store_true", help="replace a finished shard set")
        if plan:
            sub.set_defaults(plans=lambda args: {args.output: plan(args)})
        return sub

    def with_images(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument(
            "--resize", type=positive, default=0, help="shorter side at most so many pixels; default: bytes as they are"
        )
        return sub

    def splits(sub: argparse.ArgumentParser, about: str, default: str | None = None) -> argparse.ArgumentParser:
        sub.add_argument("--split", required=default is None, default=default, help=about)
        return sub

    def languages(sub: argparse.ArgumentParser, example: str) -> None:
        sub.add_argument(
            "--language",
            type=words,
            default=("en",),
            help=f"one, or several as {example}: of each a caption (default: en)",
        )

    def some_questions(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--questions",
            type=pattern,
            metavar="PATTERN",
            help="those alone in which this regular expression is found, in any case, such as '^how many'; default: all",
        )

    sub = with_images(
        dataset(
            "karpathy",
            "COCO or Flickr30k captions with Karpathy's split file",
            lambda a: sources.karpathy(a.root, a.dataset, a.split.split("+"), a.resize),
            "the download: images and karpathy/dataset_<name>.json",
        )
    )
    sub.add_argument("--dataset", choices=["coco", "flickr30k"], required=True)
    splits(sub, "train, restval, val, test, or several joined by +")
    with_images(
        dataset(
            "vg",
            "Visual Genome region descriptions",
            lambda a: sources.visual_genome(a.root, a.resize),
            "the download: annotations/region_descriptions.json, images/VG_100K and images/VG_100K_2",
        )
    )
    with_images(
        dataset(
            "sbu",
            "SBU captions in ViLT's layout",
            lambda a: sources.annotated(a.root, Path("annot.json"), "images_train", "sbu", a.resize),
            "annot.json and images_train/*/*",
        )
    )
    sub = with_images(
        dataset(
            "conceptual",
            "Conceptual Captions 3M or 12M in ViLT's layout",
            lambda a: sources.annotated(
                a.root, Path(f"{a.split}_annot.json"), f"images_{a.split}", f"conceptual-{a.split}", a.resize
            ),
            "<split>_annot.json and images_<split>/*/*",
        )
    )
    splits(sub, "train or val (default: %(default)s)", "train")
    sub = with_images(
        dataset(
            "img2dataset",
            "img2dataset's output (LAION, CC3M, CC12M, SBU) without what cannot be used",
            lambda a: sources.img2dataset(a.input, a.resize, a.prefix, a.samples_per_shard),
        )
    )
    sub.add_argument("--input", nargs="+", required=True, help="folders or tar files; {000..009} and * are expanded")
    sub.add_argument("--prefix", default="pairs", help="beginning of the shards' names (default: %(default)s)")
    sub = with_images(
        dataset(
            "vqav2",
            "VQAv2: questions with soft scores over the answers that occur often",
            lambda a: sources.vqav2(a.root, a.split, a.least, a.resize, a.questions),
            "the downloads: train2014/, val2014/, test2015/, v2_OpenEnded_*_questions.json, v2_mscoco_*_annotations.json",
        )
    )
    splits(sub, "train, val, test or test-dev")
    sub.add_argument("--least", type=positive, default=9, help="times an answer occurs to count (9: 3,129 answers)")
    some_questions(sub)
    sub = with_images(
        dataset(
            "easy_vqa",
            "easy-VQA: rendered shapes with questions",
            lambda a: sources.easy_vqa(a.root, a.split, a.resize, a.questions),
            "<split>_questions.json, <split>_images.tar or <split>/images/, answers.txt",
        )
    )
    splits(sub, "train or test")
    some_questions(sub)
    sub = with_images(
        dataset(
            "nlvr1",
            "Cornell NLVR v1, sentences that are true or false of rendered pictures",
            lambda a: nlvr1.nlvr1(a.root, a.split.split("+"), a.kind, a.augment, a.resize),
            "<split>.json and <split>_images.tar",
        )
    )
    splits(sub, "dev, hidden, or several joined by + (default: %(default)s)", "dev")
    sub.add_argument(
        "--kind",
        choices=nlvr1.KINDS,
        default="captions",
        help="captions: the true sentences; questions: all, for task vqa; pairs: all, for task nlvr2; annotations: made "
        "of the annotations, both captions and questions (default: captions)",
    )
    sub.add_argument(
        "--augment",
        action="store_true",
        help="for training: each sample in all six exchanges of its three colours, in pictures and words alike, and "
        "captions of all six pictures instead of the first",
    )
    sub = with_images(
        dataset(
            "nlvr2",
            "NLVR2: pairs of photographs with sentences that are true or false of them",
            lambda a: sources.nlvr2(a.root, a.split, a.resize),
            "the repository with nlvr2/data/, and images/train/*, dev/, test1/",
        )
    )
    splits(sub, f"one of {', '.join(sources.NLVR2_SPLITS)}")
    sub = with_images(
        dataset(
            "emoji",
            "emoji in one style of drawing, with their names in one or several languages",
            lambda a: emoji.emoji(a.root, a.style, a.language, a.captions, a.split, a.resize),
            "the unpacked npm packages emoji-datasource-<style> and cldr-annotations-full, each in a folder of its name (as in node_modules): "
            "npm pack emoji-datasource-google@16 cldr-annotations-full@48; tar xzf <file> --strip-components=1 -C <folder>",
        )
    )
    sub.add_argument("--style", required=True, help=f"one of {', '.join(emoji.STYLES)}")
    languages(sub, "en,de,ja")
    sub.add_argument(
        "--captions",
        choices=emoji.KINDS,
        default="names",
        help="names: one caption for each language; keywords: what else is told of the emoji, in one caption (default: %(default)s)",
    )
    splits(sub, "train, test (of five emoji one) or all, in each style the same (default: %(default)s)", "all")
    sub = with_images(
        dataset(
            "stamps",
            "Tux Paint's stamps: drawings and photographs, with a sentence in one or several languages",
            lambda a: stamps.stamps(a.root, a.language, a.split, a.resize),
            "the unpacked Debian package tuxpaint-stamps-default, or its folder stamps: "
            "apt-get download tuxpaint-stamps-default; dpkg-deb -x <file> <folder>",
        )
    )
    languages(sub, "en,de,zh_TW")
    splits(sub, "train, test (of five English sentences one) or all (default: %(default)s)", "all")
    with_images(
        dataset(
            "image_folder",
            "images in one folder for each class (ImageNet)",
            lambda a: sources.image_folder(a.root, a.resize),
            "folder of folders",
        )
    )
    with_images(
        dataset(
            "folder",
            "pictures with .txt or .json files of the same names beside them, or pictures alone",
            lambda a: folder.folder(a.root, a.resize),
            "folder of pictures, nested or not",
        )
    )
    sub = with_images(
        dataset(
            "table",
            "csv, tsv, jsonl, a JSON array or parquet: a column of paths or URLs of images and one of captions",
            lambda a: table.table(
                a.input,
                table.Columns(a.image, a.caption, a.image_id, a.columns, a.quotes),
                a.root,
                a.resize,
                a.samples_per_shard,
            ),
        )
    )
    sub.add_argument("--input", nargs="+", required=True, help="tables; the endings of their names say what they are")
    sub.add_argument("--image", "--url", default="image", help="column of paths or URLs (default: %(default)s)")
    sub.add_argument("--caption", default="caption", help="column of captions (default: %(default)s)")
    sub.add_argument("--image_id", help="column that says which rows show the same picture; default: the same bytes do")
    sub.add_argument("--root", help="folder or URL that paths are relative to; default: the table's own")
    sub.add_argument(
        "--columns", type=words, default=(), help="names of all columns, of a csv or tsv without a line of them: a,b,c"
    )
    sub.add_argument(
        "--no_quotes", dest="quotes", action="store_false", help="quotes in a csv or tsv are text like any other"
    )
    sub = with_images(
        dataset(
            "coco-captions",
            "COCO's own captions_*.json with its folder of images",
            lambda a: sources.coco_captions(a.annotations, a.images, a.resize),
        )
    )
    sub.add_argument("--annotations", type=Path, required=True, help="captions_train2017.json or one like it")
    sub.add_argument(
        "--images", type=Path, help="folder of the images; default: train2017/ beside the file or its folder"
    )
    sub = with_images(
        dataset(
            "arrow",
            "arrow and parquet files of ViLT (and those that took it over) and Hugging Face datasets, and folders that save_to_disk writes",
            arrow,
        )
    )
    sub.add_argument("--input", type=Path, nargs="+", required=True, help="files or folders")
    sub.add_argument("--split", help="one of the splits of a folder that holds several")
    sub.add_argument("--image", help="column of images; default: image or img")
    sub.add_argument("--caption", help="column of captions; default: caption, captions or text")
    sub.add_argument("--image_id", default="image_id", help="default: %(default)s, if there is one")
    sub = dataset(
        "text",
        "plain text files, one paragraph a line",
        lambda a: sources.text(a.input, a.words, a.tokenizer, a.max_text_len, a.samples_per_shard),
    )
    sub.add_argument("--input", type=Path, nargs="+", required=True, help="text files")
    sub.add_argument("--words", type=positive, default=32, help="words per sample at most (default: %(default)s)")
    sub.add_argument("--tokenizer", help="fill samples by word pieces: a Hugging Face name, a folder or a vocab.txt")
    sub.add_argument("--max_text_len", type=positive, default=40, help="word pieces per sample, with --tokenizer")
    sub = dataset(
        "synthetic",
        "the built-in world: folders train, one, test and text under --output",
        None,
    )
    sub.add_argument("--train", type=positive, default=16000, help="training scenes (default: %(default)s)")
    sub.add_argument("--test", type=positive, default=256, help="held-out scenes (default: %(default)s)")
    sub.add_argument("--text", type=positive, default=16000, help="sentences of the text corpus (default: %(default)s)")
    sub.add_argument("--image_size", type=positive, default=96, help="pixels per side (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sub.set_defaults(plans=synthetic)
    sub = dataset(
        "synthetic_web",
        "the built-in world with captions that are not all right: folders human, web, one (the web's scenes of one thing) and test under "
        "--output",
        None,
    )
    sub.add_argument(
        "--human", type=positive, default=1000, help="scenes with captions of people (default: %(default)s)"
    )
    sub.add_argument(
        "--web", type=positive, default=8000, help="scenes with captions of the web (default: %(default)s)"
    )
    sub.add_argument(
        "--exchanged",
        type=share,
        default=0.3,
        help="of the web's captions those of another image (default: %(default)s)",
    )
    sub.add_argument(
        "--test", type=positive, default=256, help="scenes that `synthetic` holds out (default: %(default)s)"
    )
    sub.add_argument("--image_size", type=positive, default=96, help="pixels per side (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="as that of `synthetic` (default: %(default)s)")
    sub.set_defaults(plans=synthetic_web)
    return top


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(text)


def pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a regular expression: {error}") from None


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def arrow(args: argparse.Namespace) -> Plan:
    from vlmo_ds.data.prepare.arrow import arrow  # pyarrow is an extra

    return arrow(args.input, args.image, args.caption, args.image_id, args.split, args.resize, args.samples_per_shard)


def synthetic(args: argparse.Namespace) -> dict[Path, Plan]:
    pairs = partial(sources.synthetic_pairs, train=args.train, held_out=args.test, seed=args.seed, size=args.image_size)
    one = pairs("train", things=1)
    return {
        args.output / "train": pairs("train"),
        **({args.output / "one": one} if one.items else {}),
        args.output / "test": pairs("test"),
        args.output / "text": sources.synthetic_text(args.text, args.seed),
    }


def synthetic_web(args: argparse.Namespace) -> dict[Path, Plan]:
    sizes = (args.human, args.web, args.exchanged, args.test, args.seed, args.image_size)
    held_out = sources.synthetic_pairs("test", args.human + args.web, args.test, args.seed, args.image_size)
    one = sources.synthetic_web("web", *sizes, things=1)
    return {
        **{args.output / kind: sources.synthetic_web(kind, *sizes) for kind in ("human", "web")},
        **({args.output / "one": one} if one.items else {}),
        args.output / "test": held_out,
    }


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        for target, plan in args.plans(args).items():
            print(
                write_set(
                    plan,
                    target,
                    samples_per_shard=args.samples_per_shard,
                    processes=args.processes,
                    overwrite=args.overwrite,
                )
            )
    except (DataError, OSError) as error:  # OSError: --output cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the shards that are finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
