"""Zero-shot classification: an image's class is the one whose name, in sentences, is nearest (CLIP, arXiv:2103.00020).

    python -m vlmo_ds.evaluation.zero_shot RUN --shards PATTERN ... --classes FILE [--templates FILE] [--output FILE]

The recipe's section zero_shot says the same for the end of a run, and while it trains. Shards hold images with a class in .json ("label": a number from 0, or "class": one of the names) or .cls, as
`python -m vlmo_ds.data.prepare image_folder` writes them. FILE: one class name, or one template with {} in it, a line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import EvaluationConfig, RecipeError, ZeroShotConfig, number
from vlmo_ds.data.meta import is_label, is_whole, shown
from vlmo_ds.data.shards import RawSample, lines
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import classification, runs
from vlmo_ds.families.step import FamilyModel

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}.")


@torch.no_grad()
def class_features(
    model: FamilyModel,
    classes: Sequence[str],
    templates: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    collector: Collector,
) -> Tensor:
    """[classes, D]: the mean of the unit-length features of a class's sentences, of unit length again."""
    device = next(model.parameters()).device
    sentences = [template.replace("{}", name) for name in classes for template in templates]
    texts = runs.tokenised(sentences, tokenizer, model.config.max_text_len)

    def compute(rows: Tensor) -> Tensor:
        return model({k: v.to(device) for k, v in texts.batch(rows).items()}, "encode_text")["text"]

    found = runs.share(len(sentences), batch, collector, compute).view(len(classes), len(templates), -1)
    return F.normalize(found.mean(1), dim=-1)


def label_of(raw: RawSample, classes: Sequence[str]) -> int:
    """The number of a picture's class. DataError where .json names none, or label and class name different ones."""
    label, name = raw.label, raw.meta.get("class")
    if is_label(label) and label < len(classes):
        if name in classes and name != classes[label]:
            raise DataError(
                f"{raw.name}: its .json has label {label}, which is '{classes[label]}', and class '{name}': is --classes in "
                "the order of the labels?"
            )
        return label
    if not is_whole(label):
        for named in (name, label):  # a .cls may hold a name
            if classes.count(named) == 1:
                return classes.index(named)
    raise DataError(
        f"{raw.name}: its .json has label {shown(label)} and class {shown(name)}; accepted: a label from 0 to "
        f"{len(classes) - 1} in .json or .cls, or one of the class names"
    )


@torch.no_grad()
def evaluate(
    model: FamilyModel,
    config: EvaluationConfig,
    classes: Sequence[str],
    templates: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
) -> dict[str, float]:
    """Percent of images whose class is among the best 1 and 5, on every rank. Of equally near classes the first counts."""
    model.eval()
    class_CD = class_features(model, classes, templates, tokenizer, config.batch_size, collector)

    def scores(images: Tensor) -> Tensor:
        return model({"image": images}, "encode_image")["image"] @ class_CD.t()

    return classification.accuracy(model, scores, lambda raw: label_of(raw, classes), config, collector, "zero-shot")


def read_lines(path: Path, what: str) -> list[str]:
    try:
        found = [line.strip() for line in lines(path.read_bytes().decode("utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}, the {what}: {error}") from None
    if not found:
        raise RecipeError(f"{path}, the {what}, is empty")
    return found


def names_and_pictures(config: ZeroShotConfig) -> Iterator[tuple[str, list[bytes]]]:
    """As runs.names_and_pictures. DataError where a sample has none of the classes either."""
    classes, _ = names_of(config)
    return classification.names_and_pictures(config, lambda raw: label_of(raw, classes))


def names_of(config: ZeroShotConfig) -> tuple[list[str], Sequence[str]]:
    """(class names, templates). RecipeError where a file cannot be used."""
    classes = read_lines(Path(config.classes), "class names")
    if config.templates is None:
        return classes, TEMPLATES
    templates = read_lines(Path(config.templates), "templates")
    if without := next((template for template in templates if "{}" not in template), None):
        raise RecipeError(f"{config.templates}: '{without}' has no {{}} for the name of a class")
    return classes, templates


def check(config: ZeroShotConfig, max_text_len: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """RecipeError where the settings name files that cannot be used."""
    names_of(config)


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--classes",
        help="class names, one a line, in the order of the labels (default: the recipe's zero_shot.classes)",
    )
    parser.add_argument("--templates", help=f"sentences with {{}} (default: the recipe's, or {'; '.join(TEMPLATES)})")
    parser.add_argument("--batch_size", type=number(int), help="images per forward pass (default: the recipe's, or 64)")
    args = parser.parse_args()
    runs.check_outputs(output=args.output)
    _, recipe, model, tokenizer = runs.open_run(args.run, "encode_text", args.weights)
    given = {name: getattr(args, name) for name in ("shards", "classes", "templates", "batch_size")}
    config = ZeroShotConfig.of(recipe.zero_shot, "zero_shot", **given)
    metrics = evaluate(model, config, *names_of(config), tokenizer, model.collector)
    print(classification.table(metrics, "zero-shot"))
    if args.output:
        write_atomically(args.output, runs.as_json(metrics))


if __name__ == "__main__":
    sys.exit(runs.command(main))
