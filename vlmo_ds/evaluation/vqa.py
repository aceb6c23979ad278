"""Visual question answering: accuracy by the official rule, and the file that the challenge's server takes.

    python -m vlmo_ds.evaluation.vqa RUN [--shards PATTERN ...] [--method list|generate] [--submission FILE] [--output FILE]

RUN is a run's directory (the weights of its last stage with task vqa are used) or a stage's final folder inside it. A model that
writes answers chooses the best of the run's list (answers.json) unless it is to write freely (generate); the others have the list alone.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import DecodingConfig, RecipeError, VQAConfig
from vlmo_ds.data.prepare.answers import normalize_answer
from vlmo_ds.data.shards import ANSWERS, RawSample, parse_answers
from vlmo_ds.data.storage import write_atomically
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.evaluation import runs
from vlmo_ds.families.step import FamilyModel
from vlmo_ds.generation.decoding import written

METHODS = VQAConfig.model_fields["method"].description


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
    config: VQAConfig,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
) -> list[dict[str, Any]]:
    """question_id, answer (and accuracy, answer_type where the data has them) of every question, on every rank.

    RecipeError where the answers are to be written and the model only chooses.
    """
    given = (read, "question", config, tokenizer, collector)
    if config.method == "generate":
        pairs = written_answers(model, *given)
    else:
        also = listed(answers, model, config, tokenizer) if model.gives("answer_step") else {}
        best = runs.best_classes(model, "answer", *given, also)
        pairs = ((entry, answers[number]) for entry, number in best)
    found = []
    for entry, answer in pairs:
        row = {"question_id": entry["question_id"], "answer": answer}
        if entry.get("answers"):
            row |= {"accuracy": accuracy(answer, entry["answers"]), "answer_type": entry.get("answer_type", "")}
        found.append(row)
    every = [row for rows in collector.each_rank(found) for row in rows]
    return sorted(every, key=lambda row: (str(type(row["question_id"])), row["question_id"]))


def listed(
    answers: Sequence[str], model: FamilyModel, config: VQAConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor | int]:
    """What a model that writes answers needs to choose among some."""
    texts = runs.tokenised(answers, tokenizer, model.config.max_text_len)
    device = next(model.parameters()).device
    return {
        "listed_ids": texts.ids.to(device),
        "listed_lengths": texts.lengths.to(device),
        "candidates": config.candidates,
    }


@torch.no_grad()
def written_answers(
    model: FamilyModel,
    read: runs.Read,
    text: str,
    config: VQAConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector,
) -> Iterator[tuple[dict, str]]:
    """(entry, answer) of this rank's share of the questions, by beam search. Arguments as runs.best_classes'."""
    if not model.gives("answer_step"):
        raise RecipeError("method is 'generate', and the model chooses among the answers of its list; accepted: 'list'")
    begin, end = tokenizer("")["input_ids"][:-1], tokenizer("")["input_ids"][-1]
    length = min(config.max_length, model.config.max_text_len)
    decoding = DecodingConfig(method="beam", beams=config.beams, max_length=length)
    calls = ("read_question", "answer_step")
    batches = runs.batches_of_entries(model, "writing answers", read, text, config, tokenizer, collector)
    for entries, batch in batches:
        batch["image_id"] = torch.zeros_like(batch["text_ids"][:, 0])  # nothing is drawn
        for entry, (ids, *_) in zip(entries, written(model, batch, begin, end, decoding, calls=calls), strict=True):
            yield entry, tokenizer.decode(ids, skip_special_tokens=True).strip()


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
    parser.add_argument("--method", choices=get_args(VQAConfig.model_fields["method"].annotation), help=METHODS)
    parser.add_argument("--submission", type=Path, help="write question_id and answer of every question here")
    args = parser.parse_args()
    runs.check_outputs(output=args.output, submission=args.submission)
    run, recipe, model, tokenizer = runs.open_run(args.run, "answer", args.weights)
    own = run / ANSWERS
    for option in ("submission", "output"):
        file = getattr(args, option)
        if file and file.resolve() == own.resolve():
            raise RecipeError(
                f"--{option}: {own} is the list of answers that the run was trained with; name another file"
            )
    config = VQAConfig.of(recipe.vqa, "vqa", shards=args.shards, method=args.method)
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
