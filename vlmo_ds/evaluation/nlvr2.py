"""NLVR2: accuracy, and consistency over the pairs of images that share a sentence.

    python -m vlmo_ds.evaluation.nlvr2 RUN [--shards PATTERN ...] [--predictions FILE] [--output FILE]

RUN is a run's directory (the weights of its last stage with task nlvr2 are used) or a stage's final folder inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import EvaluationConfig
from vlmo_ds.data.shards import RawSample, is_true
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.families.step import FamilyModel


def sentence_of(row: Mapping[str, Any]) -> str:
    """What all examples with one sentence share: sentence_id, or of split-set-pair-sentence all but the pair.

    The latter is the rule of the official evaluation (arXiv:1811.00491).
    """
    if row.get("sentence_id"):
        return row["sentence_id"]
    parts = row["identifier"].split("-")
    return "-".join(parts[:2] + parts[3:])


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent of right examples, and of sentences all of whose examples are right."""
    consistent: dict[str, bool] = {}
    for row in rows:
        key = sentence_of(row)
        consistent[key] = consistent.get(key, True) and row["predicted"] == row["label"]
    right = sum(row["predicted"] == row["label"] for row in rows)
    return {
        "accuracy": 100 * right / len(rows),
        "consistency": 100 * sum(consistent.values()) / len(consistent),
        "examples": len(rows),
        "sentences": len(consistent),
    }


def read(raw: RawSample) -> tuple[dict[str, bytes], list[dict]]:
    pictures = {f"image_{number}": raw.picture(f"{number}.") for number in (0, 1)}
    return pictures, raw.entries("sentences", ("sentence", "label", "identifier"))


def evaluate(
    model: FamilyModel, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, collector: Collector
) -> list[dict[str, Any]]:
    """identifier, label and prediction (both bool) of every example, on every rank."""
    found = [
        {
            "identifier": str(entry["identifier"]),
            "sentence_id": entry.get("sentence_id"),
            "label": is_true(entry["label"]),
            "predicted": bool(best),
        }
        for entry, best in runs.best_classes(model, "compare", read, "sentence", config, tokenizer, collector)
    ]
    return sorted((row for rows in collector.each_rank(found) for row in rows), key=lambda row: row["identifier"])


def table(metrics: Mapping[str, float]) -> str:
    return (
        f"nlvr2: {int(metrics['examples'])} examples, accuracy {metrics['accuracy']:.2f}, consistency "
        f"{metrics['consistency']:.2f} over {int(metrics['sentences'])} sentences"
    )


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--predictions", type=Path, help="write lines of identifier,True or False here")
    args = parser.parse_args()
    runs.check_outputs(output=args.output)
    _, recipe, model, tokenizer = runs.open_run(args.run, "compare", args.weights)
    config = EvaluationConfig.of(recipe.nlvr2, "nlvr2", shards=args.shards)
    rows = evaluate(model, config, tokenizer, model.collector)
    metrics = scores(rows)
    print(table(metrics))
    if args.predictions:
        lines = "".join(f"{row['identifier']},{row['predicted']}\n" for row in rows)
        write_atomically(args.predictions, lines.encode())
    if args.output:
        write_atomically(args.output, runs.as_json(metrics))


if __name__ == "__main__":
    sys.exit(runs.command(main))
