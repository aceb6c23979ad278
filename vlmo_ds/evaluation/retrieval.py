"""Image-text retrieval on shards: recall at 1, 5 and 10 from the itc features, and re-ranked by the itm head.

    python -m vlmo_ds.evaluation.retrieval RUN [--shards PATTERN ...] [--rerank K] [--output FILE]

RUN is a run's directory (its last stage's weights are used) or a stage's final folder inside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import Recipe, RecipeError, RetrievalConfig, load_recipe
from vlmo_ds.data.loader import collate
from vlmo_ds.data.shards import list_shards
from vlmo_ds.data.storage import DataError, write_atomically
from vlmo_ds.data.tokenizer import load_tokenizer
from vlmo_ds.data.transforms import EncodedImage, pixels, square
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.vlmo import VLMo
from vlmo_ds.training.weights import read_weights

RANKS = (1, 5, 10)


@dataclass
class RetrievalSet:
    """Images with one or more captions each. image_of_text: for each caption, the image it belongs to."""

    images: Tensor  # [I, 3, S, S] uint8
    encoded: list[bytes]  # as stored, for the gallery
    captions: list[str]
    text_ids: Tensor  # [T, L]
    image_of_text: Tensor  # [T] int64


def load_set(
    config: RetrievalConfig, image_size: int, max_text_len: int, tokenizer: PreTrainedTokenizerBase
) -> RetrievalSet:
    """Reads whole shards; samples with the same image_id are one image with several captions."""
    index: dict[int, int] = {}
    images, encoded, captions, owner = [], [], [], []
    for shard in list_shards(config.shards):
        for row in range(shard.samples):
            raw = shard.read(row)
            if raw.image_id not in index:
                if config.max_images and len(index) == config.max_images:
                    continue
                index[raw.image_id] = len(index)
                encoded.append(raw.image)
                try:
                    picture = square(EncodedImage(raw.image), image_size, np.random.default_rng(0))
                except ValueError as error:
                    raise DataError(f"{raw.name}: {error}") from None
                images.append(torch.from_numpy(pixels(picture).copy()))
            for caption in raw.captions:
                captions.append(caption)
                owner.append(index[raw.image_id])
    tokens = [
        {"text_ids": np.asarray(ids, dtype=np.int64)}
        for ids in tokenizer(captions, truncation=True, max_length=max_text_len)["input_ids"]
    ]
    return RetrievalSet(
        torch.stack(images), encoded, captions, collate(tokens, max_text_len)["text_ids"], torch.tensor(owner)
    )


def text_batch(ids: Tensor) -> dict[str, Tensor]:
    """[B, L] with padding -> text_ids and text_masks, trimmed to the longest."""
    length = int((ids != 0).sum(1).max())
    return {"text_ids": ids[:, :length], "text_masks": (ids[:, :length] != 0).long()}


@torch.no_grad()
def features(model: VLMo, data: RetrievalSet, batch: int, collector: Collector) -> tuple[Tensor, Tensor]:
    """Contrastive features of all images and all captions, [I, D] and [T, D]; each rank encodes its share."""
    device = next(model.parameters()).device
    images = share(
        len(data.images),
        batch,
        collector,
        lambda rows: model({"image": data.images[rows].to(device)}, "encode_image")["image"],
    )
    texts = share(
        len(data.text_ids),
        batch,
        collector,
        lambda rows: model({k: v.to(device) for k, v in text_batch(data.text_ids[rows]).items()}, "encode_text")[
            "text"
        ],
    )
    return images, texts


def share(total: int, batch: int, collector: Collector, compute) -> Tensor:
    """compute(rows) for all rows 0 .. total-1, split over ranks and put together in order on every rank."""
    per_rank = -(-total // collector.world_size)
    mine = torch.arange(per_rank) + collector.rank * per_rank
    mine = mine.clamp(max=total - 1)  # every rank computes as many rows; those past the end are thrown away
    local = torch.cat([compute(rows) for rows in mine.split(batch)])
    return collector.gather(local)[:total]


def recalls(score_QC: Tensor, correct_QC: Tensor) -> dict[str, float]:
    """Share of queries (in percent) that have a correct candidate among the best 1, 5, 10. Ties: lower index first."""
    order = score_QC.argsort(dim=1, descending=True, stable=True)
    hit = correct_QC.gather(1, order)
    return {f"R@{k}": 100.0 * float(hit[:, :k].any(1).float().mean()) for k in RANKS}


@torch.no_grad()
def rerank(
    model: VLMo,
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
    top = logits_QC.topk(min(k, logits_QC.shape[1]), dim=1).indices
    query = torch.arange(len(top), device=top.device).repeat_interleave(top.shape[1])
    candidate = top.flatten()
    text, image = (query, candidate) if queries_are_texts else (candidate, query)
    text, image = text.cpu(), image.cpu()

    def compute(rows: Tensor) -> Tensor:
        inputs = text_batch(data.text_ids[text[rows]]) | {"image": data.images[image[rows]]}
        return model({k: v.to(device) for k, v in inputs.items()}, "match")

    log_odds = share(len(query), batch, collector, compute)
    scores = logits_QC - 1e4  # every candidate past the k best stays behind them
    return scores.scatter(1, top, logits_QC.gather(1, top) + log_odds.view_as(top).to(logits_QC.dtype))


@dataclass
class RetrievalResult:
    """metrics[direction][method] -> recalls; scores of the best method for the gallery, queries x candidates."""

    metrics: dict[str, dict[str, dict[str, float]]]
    text_to_image: Tensor
    image_to_text: Tensor


def evaluate(model: VLMo, data: RetrievalSet, config: RetrievalConfig, collector: Collector) -> RetrievalResult:
    """All ranks call; all get the result."""
    model.eval()
    image_ID, text_TD = features(model, data, config.batch_size, collector)
    logits_TI = float(model.logit_scale.detach().float().exp()) * text_TD @ image_ID.t()
    owner = data.image_of_text.to(logits_TI.device)
    correct_TI = F.one_hot(owner, len(data.images)).bool()
    best = {"text_to_image": logits_TI, "image_to_text": logits_TI.t().contiguous()}
    correct = {"text_to_image": correct_TI, "image_to_text": correct_TI.t()}
    metrics = {direction: {"itc": recalls(score, correct[direction])} for direction, score in best.items()}
    if config.rerank and "itm" in model.tasks:
        for direction in best:
            texts = direction == "text_to_image"
            best[direction] = rerank(model, data, best[direction], texts, config.rerank, config.batch_size, collector)
            metrics[direction]["itc+itm"] = recalls(best[direction], correct[direction])
    return RetrievalResult(metrics, **best)


def table(metrics: dict, images: int, captions: int) -> str:
    lines = [
        f"retrieval on {images} images and {captions} captions",
        f"{'':16}{'':10}" + "".join(f"{f'R@{k}':>8}" for k in RANKS),
    ]
    for direction, methods in metrics.items():
        for method, values in methods.items():
            numbers = "".join(f"{values[f'R@{k}']:8.1f}" for k in RANKS)
            lines.append(f"{direction.replace('_', ' '):16}{method:10}{numbers}")
    return "\n".join(lines)


def final_folder(run: Path, recipe: Recipe) -> Path:
    """The last finished stage that has the heads for retrieval."""
    for stage in reversed(recipe.stages):
        folder = run / "checkpoints" / stage.name / "final"
        if "itc" in stage.tasks and folder.is_dir():
            return folder
    raise RecipeError(
        f"{run} has no finished stage with the itc task; found {[s.name for s in recipe.stages]} in its recipe"
    )


def load_model(recipe: Recipe, folder: Path) -> VLMo:
    """A stage's final weights in a plain module."""
    name = folder.parent.name
    stage = next((s for s in recipe.stages if s.name == name), None)
    if stage is None:
        raise RecipeError(f"{folder} is no stage of its run's recipe ({', '.join(s.name for s in recipe.stages)})")
    model = VLMo(recipe.model, stage.weights, Collector())
    model.load_state_dict(read_weights(folder))
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or checkpoints/<stage>/final inside it")
    parser.add_argument("--shards", nargs="+", help="held-out shards (default: the recipe's)")
    parser.add_argument("--rerank", type=int, help="candidates that itm scores again; 0: none (default: the recipe's)")
    parser.add_argument("--max_images", type=int, help="use the first so many images")
    parser.add_argument("--output", type=Path, help="write the metrics to this JSON file")
    args = parser.parse_args()
    try:
        final = args.run if args.run.name == "final" else None
        run = args.run.parents[2] if final else args.run
        recipe = load_recipe(run / "recipe.yaml")
        settings = recipe.retrieval.model_dump() if recipe.retrieval else {"shards": args.shards or []}
        given = {"shards": args.shards, "rerank": args.rerank, "max_images": args.max_images}
        config = RetrievalConfig(**{**settings, **{k: v for k, v in given.items() if v is not None}})
        model = load_model(recipe, final or final_folder(run, recipe))
        if torch.cuda.is_available():
            model.cuda()
        data = load_set(
            config, recipe.model.image_size, recipe.model.max_text_len, load_tokenizer(str(run / "tokenizer"))
        )
        result = evaluate(model, data, config, model.collector)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result.metrics, len(data.images), len(data.captions)))
    if args.output:
        write_atomically(args.output, json.dumps(result.metrics, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
