"""Image classification by a trained head: how often the right class is the best, and among the best five.

    python -m vlmo_ds.evaluation.classification RUN [--shards PATTERN ...] [--batch_size N] [--output FILE]

RUN is a run's directory (the weights of its last stage with task classification are used) or a stage's final folder inside it. Shards hold
images with the number of their class in .json ("label") or .cls, as `python -m vlmo_ds.data.prepare image_folder` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmo_ds.config import EvaluationConfig, number
from vlmo_ds.data.shards import RawSample, list_shards
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.families.step import FamilyModel

BEST = (1, 5)


def names_and_pictures(
    config: EvaluationConfig, label: Callable[[RawSample], int]
) -> Iterator[tuple[str, list[bytes]]]:
    """As runs.names_and_pictures. DataError where a sample has no class either; label: a sample's."""

    def read(raw: RawSample) -> tuple[dict[str, bytes], list[dict]]:
        return {"image": raw.image}, [{"label": label(raw)}]

    return runs.names_and_pictures(config, read)


@torch.no_grad()
def accuracy(
    model: FamilyModel,
    scores: Callable[[Tensor], Tensor],
    label: Callable[[RawSample], int],
    config: EvaluationConfig,
    collector: Collector,
    what: str,
) -> dict[str, float]:
    """Percent of images whose class is among the best 1 and 5, on every rank. Of equally good classes the first counts.

    scores: uint8 images [B, 3, S, S] -> [B, C]; label: a sample's class; what: is told while it runs.
    """
    device = next(model.parameters()).device

    def make(raw: RawSample) -> list[dict]:
        return [{"image": runs.square_pixels(raw.image, model.config.image_size, raw.name), "label": label(raw)}]

    counts = torch.zeros(1 + len(BEST), dtype=torch.float64)
    samples = runs.Samples(list_shards(config.shards), make, collector)
    for batch in runs.examples_in_batches(samples, config.batch_size, config.workers, what):
        images = torch.stack([example["image"] for example in batch]).to(device)
        order = scores(images).argsort(dim=1, descending=True, stable=True).cpu()
        hits = order == torch.tensor([example["label"] for example in batch])[:, None]
        counts += torch.tensor([len(batch), *(float(hits[:, :k].any(1).sum()) for k in BEST)], dtype=torch.float64)
    total, *right = collector.sum(counts.to(device)).tolist()
    return {f"top-{k}": 100 * n / total for k, n in zip(BEST, right, strict=True)} | {"images": total}


def evaluate(model: FamilyModel, config: EvaluationConfig, collector: Collector) -> dict[str, float]:
    """As accuracy's, of the model's own head."""
    model.eval()
    settings: Any = model.config
    return accuracy(
        model,
        lambda images: model({"image": images}, "classify"),
        lambda raw: raw.label_below(settings.num_classes),
        config,
        collector,
        "classification",
    )


def table(metrics: Mapping[str, float], what: str = "classification") -> str:
    best = ", ".join(f"top-{k} {metrics[f'top-{k}']:.2f}" for k in BEST)
    return f"{what}: {int(metrics['images'])} images, {best}"


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--batch_size", type=number(int), help="images per forward pass (default: the recipe's, or 64)")
    args = parser.parse_args()
    runs.check_outputs(output=args.output)
    _, recipe, model, _ = runs.open_run(args.run, "classify", args.weights)
    given = {name: getattr(args, name) for name in ("shards", "batch_size")}
    metrics = evaluate(model, EvaluationConfig.of(recipe.classification, "classification", **given), model.collector)
    print(table(metrics))
    if args.output:
        write_atomically(args.output, runs.as_json(metrics))


if __name__ == "__main__":
    sys.exit(runs.command(main))
