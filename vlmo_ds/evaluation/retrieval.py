"""Image-text retrieval on shards: recall at 1, 5 and 10 from the itc features, and re-ranked by the itm head.

    python -m vlmo_ds.evaluation.retrieval RUN [--shards PATTERN ...] [--rerank K] [--output FILE]

RUN is a run's directory (its last stage's weights are used) or a stage's final folder inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import RecipeError, RetrievalConfig, number
from vlmo_ds.data.shards import RawSample, list_shards
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed import heartbeat
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.evaluation.runs import Texts, share, square_pixels, tokenised
from vlmo_ds.families.step import FamilyModel

RANKS = (1, 5, 10)
CONTRAST, RERANKED = "itc", "itc+itm"  # methods: contrastive features; the best of them judged as pairs again


@dataclass
class RetrievalSet:
    """Images with one or more captions each. image_of_text: for each caption, the image it belongs to."""

    images: Tensor  # [I, 3, S, S] uint8
    encoded: list[bytes]  # as stored, for the gallery
    captions: list[str]
    texts: Texts
    image_of_text: Tensor  # [T] int64

    def part(self, images: Tensor, captions: Tensor) -> RetrievalSet:
        """These of its images, by ascending indices, and their captions."""
        return RetrievalSet(
            self.images[images],
            [self.encoded[i] for i in images.tolist()],
            [self.captions[i] for i in captions.tolist()],
            self.texts.part(captions),
            torch.searchsorted(images, self.image_of_text[captions]),
        )


def samples(config: RetrievalConfig) -> Iterator[tuple[RawSample, int, bool]]:
    """Every sample of the set, the number of its image, and whether it is the first that shows it."""
    index: dict[int, int] = {}
    for shard, row in runs.places_of(list_shards(config.shards)):
        raw = shard.read(row)
        first = raw.image_id not in index
        if first and config.max_images and len(index) == config.max_images:
            continue
        yield raw, index.setdefault(raw.image_id, len(index)), first


def names_and_pictures(config: RetrievalConfig) -> Iterator[tuple[str, list[bytes]]]:
    """Of every sample the name, and the picture if it is read. DataError or RecipeError where one could not be used."""
    images = 0
    for raw, _, first in samples(config):
        _ = raw.captions
        images += first
        yield raw.name, [raw.image] if first else []
    check_folds(images, config.folds)


def load_set(
    config: RetrievalConfig, image_size: int, max_text_len: int, tokenizer: PreTrainedTokenizerBase
) -> RetrievalSet:
    """Reads whole shards; samples with the same image_id are one image with several captions."""
    images, encoded, captions, owner = [], [], [], []
    for raw, image, first in samples(config):
        heartbeat.beat("reading the held-out set")
        if first:
            encoded.append(raw.image)
            images.append(square_pixels(raw.image, image_size, raw.name))
        captions += raw.captions
        owner += [image] * len(raw.captions)
    texts = tokenised(captions, tokenizer, max_text_len)
    return RetrievalSet(torch.stack(images), encoded, captions, texts, torch.tensor(owner))


@torch.no_grad()
def features(model: FamilyModel, data: RetrievalSet, batch: int, collector: Collector) -> tuple[Tensor, Tensor]:
    """Contrastive features of all images and all captions, [I, D] and [T, D]; each rank encodes its share."""
    device = next(model.parameters()).device
    images = share(
        len(data.images),
        batch,
        collector,
        lambda rows: model({"image": data.images[rows].to(device)}, "encode_image")["image"],
    )
    texts = share(
        len(data.texts.ids),
        batch,
        collector,
        lambda rows: model({k: v.to(device) for k, v in data.texts.batch(rows).items()}, "encode_text")["text"],
    )
    return images, texts


def best_first(score_QC: Tensor, k: int) -> Tensor:
    """Indices of each query's k best candidates, [Q, min(k, C)] int64. Ties: lower index first."""
    return score_QC.argsort(dim=1, descending=True, stable=True)[:, :k]


def recalls(score_QC: Tensor, correct_QC: Tensor) -> dict[str, float]:
    """Share of queries (in percent) that have a correct candidate among the best 1, 5, 10."""
    hit = correct_QC.gather(1, best_first(score_QC, max(RANKS)))
    return {f"R@{k}": 100.0 * float(hit[:, :k].any(1).float().mean()) for k in RANKS}


@torch.no_grad()
def rerank(
    model: FamilyModel,
    data: RetrievalSet,
    logits_QC: Tensor,
    queries_are_texts: bool,
    k: int,
    batch: int,
    collector: Collector,
) -> Tensor:
    """Scores each query's k best candidates again: contrastive logit + matching log-odds; the others keep their order.

    itm was trained on negatives drawn from the softmax of the contrastive logits, so its log-odds estimate how much
    more likely a pair is than that softmax says: the sum is the better estimate of the two together.
    """
    device = next(model.parameters()).device
    top = best_first(logits_QC, k)
    query = torch.arange(len(top), device=top.device).repeat_interleave(top.shape[1])
    candidate = top.flatten()
    text, image = (query, candidate) if queries_are_texts else (candidate, query)
    text, image = text.cpu(), image.cpu()

    def compute(rows: Tensor) -> Tensor:
        inputs = data.texts.batch(text[rows]) | {"image": data.images[image[rows]]}
        return model({k: v.to(device) for k, v in inputs.items()}, "match")

    log_odds = share(len(query), batch, collector, compute)
    scores = logits_QC.double()
    again = scores.gather(1, top) + log_odds.view_as(top).double()
    return (scores - 1e4).scatter_(1, top, again)  # every candidate past the k best stays behind them


@dataclass
class RetrievalResult:
    """metrics[direction][method] -> recalls; scores of the best method for the gallery, queries x candidates."""

    metrics: dict[str, dict[str, dict[str, float]]]
    text_to_image: Tensor
    image_to_text: Tensor


def evaluate(model: FamilyModel, data: RetrievalSet, config: RetrievalConfig, collector: Collector) -> RetrievalResult:
    """All ranks call; all get the result."""
    parts = parts_of(data, config.folds)
    model.eval()
    image_ID, text_TD = features(model, data, config.batch_size, collector)
    logits_TI = float(model.contrast_scale()) * text_TD @ image_ID.t()
    metrics, best = directions(model, data, logits_TI, config, collector)
    if config.folds > 1:
        found = [
            directions(model, data.part(images, captions), logits_TI[captions][:, images], config, collector)[0]
            for images, captions in parts
        ]
        for direction, methods in found[0].items():
            for method, values in methods.items():
                mean = {name: sum(part[direction][method][name] for part in found) / len(found) for name in values}
                metrics[direction][f"{method}, mean of {len(found)} parts"] = mean
    return RetrievalResult(metrics, **best)


def directions(
    model: FamilyModel, data: RetrievalSet, logits_TI: Tensor, config: RetrievalConfig, collector: Collector
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, Tensor]]:
    """(the metrics of both directions, each one's scores by its best method)."""
    correct_TI = F.one_hot(data.image_of_text.to(logits_TI.device), len(data.images)).bool()
    best = {"text_to_image": logits_TI, "image_to_text": logits_TI.t().contiguous()}
    correct = {"text_to_image": correct_TI, "image_to_text": correct_TI.t()}
    judges_pairs = model.gives("match")
    metrics = {}
    for direction in best:
        found = {CONTRAST: best[direction]}
        if config.rerank and judges_pairs:
            texts = direction == "text_to_image"
            found[RERANKED] = best[direction] = rerank(
                model, data, best[direction], texts, config.rerank, config.batch_size, collector
            )
        metrics[direction] = {method: recalls(score, correct[direction]) for method, score in found.items()}
    return metrics, best


def parts_of(data: RetrievalSet, folds: int) -> list[tuple[Tensor, Tensor]]:
    """(images, captions) of so many equal parts of the images in order: COCO's 1k protocol is five parts of 5,000."""
    check_folds(len(data.images), folds)
    rows = torch.arange(len(data.images)).chunk(folds)
    return [(images, torch.isin(data.image_of_text, images).nonzero().squeeze(1)) for images in rows]


def check_folds(images: int, folds: int) -> None:
    if images % folds:
        raise RecipeError(f"retrieval.folds is {folds}, which does not divide {images} images")


def table(metrics: dict, images: int, captions: int) -> str:
    width = 2 + max(len(method) for methods in metrics.values() for method in methods)
    lines = [
        f"retrieval on {images} images and {captions} captions",
        f"{'':16}{'':{width}}" + "".join(f"{f'R@{k}':>8}" for k in RANKS),
    ]
    for direction, methods in metrics.items():
        for method, values in methods.items():
            numbers = "".join(f"{values[f'R@{k}']:8.1f}" for k in RANKS)
            lines.append(f"{direction.replace('_', ' '):16}{method:{width}}{numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--rerank", type=number(int, 0), help="candidates that itm scores again; 0: none (default: the recipe's)"
    )
    parser.add_argument(
        "--folds", type=number(int), help="average over so many parts as well; COCO 1k: 5 parts of 5,000 images"
    )
    parser.add_argument("--max_images", type=number(int, 0), help="use the first so many images; 0: all")
    args = parser.parse_args()
    runs.check_outputs(output=args.output)
    _, recipe, model, tokenizer = runs.open_run(args.run, "encode_text", args.weights)
    given = {name: getattr(args, name) for name in ("shards", "rerank", "max_images", "folds")}
    config = RetrievalConfig.of(recipe.retrieval, "retrieval", **given)
    data = load_set(config, model.config.image_size, model.config.max_text_len, tokenizer)
    result = evaluate(model, data, config, model.collector)
    print(table(result.metrics, len(data.images), len(data.captions)))
    if args.output:
        write_atomically(args.output, runs.as_json(result.metrics))


if __name__ == "__main__":
    sys.exit(runs.command(main))
