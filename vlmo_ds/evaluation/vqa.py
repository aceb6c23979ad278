"""Visual question answering: accuracy by the official rule, and the file that the challenge's server takes.

    python -m vlmo_ds.evaluation.vqa RUN [--shards PATTERN ...] [--submission FILE] [--output FILE]

RUN is a run's directory (the weights of its last stage with task vqa are used) or a stage's final folder inside it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import EvaluationConfig, RecipeError
from vlmo_ds.data.prepare.answers import normalize_answer
from vlmo_ds.data.shards import ANSWERS, RawSample, parse_answers
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.families.step import FamilyModel


def accuracy(predicted: str, answers: Sequence[str]) -> float:
    """How far an answer agrees with the annotators' (VQA, arXiv:1505.00468, and its official evaluation).

    The mean over all ways to leave one annotator out of min(1, how many of the others gave the answer / 3). Answers are
    normalised only where the annotators do not all agree.
    """
    predicted, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (predicted, *answers))
    if len(set(answers)) > 1:
        predicted, *answers = map(normalize_answer, (predicted, *answers))
    same = [answer == predicted for answer in answers]
    return sum(min(1.0, (sum(same) - agrees) / 3) for agrees in same) / len(same)


def overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy in percent over all questions with known answers, and by their type where the data has it."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "accuracy" in row:
            by_type["accuracy"].append(row["accuracy"])
            if row["answer_type"]:
                by_type[f"accuracy/{row['answer_type']}"].append(row["accuracy"])
    found = {name: 100 * sum(values) / len(values) for name, values in by_type.items()}
    return found | {"questions": len(rows)}


def read(raw: RawSample) -> tuple[dict[str, bytes], list[dict]]:
    return {"image": raw.image}, raw.entries("questions", ("question", "question_id"))


def evaluate(
    model: FamilyModel,
    config: EvaluationConfig,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
) -> list[dict[str, Any]]:
    """question_id, answer (and accuracy, answer_type where the data has them) of every question, on every rank."""
    found = []
    for entry, best in runs.best_classes(model, "answer", read, "question", config, tokenizer, collector):
        row = {"question_id": entry["question_id"], "answer": answers[best]}
        if entry.get("answers"):
            row |= {"accuracy": accuracy(answers[best], entry["answers"]), "answer_type": entry.get("answer_type", "")}
        found.append(row)
    every = [row for rows in collector.each_rank(found) for row in rows]
    return sorted(every, key=lambda row: (str(type(row["question_id"])), row["question_id"]))


def read_answers(run: Path, size: int) -> list[str]:
    """The answers that a run was trained with. RecipeError or DataError unless there are so many."""
    try:
        answers = parse_answers((run / ANSWERS).read_bytes(), run / ANSWERS)
    except OSError as error:
        raise RecipeError(f"{run / ANSWERS}, the list of answers that the run was trained with: {error}") from None
    if len(answers) != size:
        raise RecipeError(f"{run / ANSWERS} has {len(answers)} answers, the model {size}")
    return answers


def submission(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What the challenge's server takes: a list of question_id and answer."""
    return json.dumps([{k: row[k] for k in ("question_id", "answer")} for row in rows]).encode()


def table(metrics: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if name != "questions")
    return f"vqa: {int(metrics['questions'])} questions{', ' + shown if shown else ', no known answers'}"


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--submission", type=Path, help="write question_id and answer of every question here")
    args = parser.parse_args()
    runs.check_outputs(output=args.output, submission=args.submission)
    run, recipe, model, tokenizer = runs.open_run(args.run, "answer")
    own = run / ANSWERS
    for option in ("submission", "output"):
        file = getattr(args, option)
        if file and file.resolve() == own.resolve():
            raise RecipeError(
                f"--{option}: {own} is the list of answers that the run was trained with; name another file"
            )
    config = EvaluationConfig.of(recipe.vqa, "vqa", shards=args.shards)
    answers = read_answers(run, recipe.model.vqav2_label_size)
    rows = evaluate(model, config, answers, tokenizer, model.collector)
    metrics = overall(rows)
    print(table(metrics))
    if args.submission:
        write_atomically(args.submission, submission(rows))
    if args.output:
        write_atomically(args.output, runs.as_json(metrics))


if __name__ == "__main__":
    sys.exit(runs.command(main))
