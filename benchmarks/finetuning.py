"""The fine-tuning commands of docs/finetuning.md on easy-VQA and NLVR v1, and what they reach.

    python benchmarks/finetuning.py --root FOLDER [--only easy_vqa|blip_easy_vqa|nlvr1] [--output FILE]

FOLDER holds the downloads easy_vqa and nlvr1. Runs that are there already go on, or are evaluated as they are. An
accuracy's 95% interval is a percentile bootstrap over what was drawn independently: easy-VQA's images, NLVR's sentences
with all their pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from common import write_results

from vlmo_ds.data.prepare.nlvr1 import scene
from vlmo_ds.evaluation.nlvr2 import scores

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "-m"]
RECIPES = "launch/recipes"
SHAPES = r"what shape|the \w+ shape|(a|no) (circle|rectangle|triangle)"  # what blip_easy_vqa asks about at first


def run(*command: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(c) for c in command], cwd=ROOT, check=True)


def train(recipe: str, *overrides: str) -> None:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    configs = ["--deepspeed_config", "ds_configs/zero2.json", "--recipe", f"{RECIPES}/{recipe}.yaml"]
    run(launcher, "--num_gpus", 2, "train_ds.py", *configs, *overrides)


def prepare(dataset: str, root: Path, split: str, output: str, *flags: str) -> None:
    if not (ROOT / output / "index.json").exists():
        given = ["--root", root / dataset, "--split", split, "--output", output]
        run(*PYTHON, "vlmo_ds.data.prepare", dataset, *given, *flags)


def summary(right: Mapping[str, bool], group: Callable[[str], str]) -> dict:
    """Percent of right answers and its interval; group: what an answer's id shares with others that go together."""
    groups = defaultdict(list)
    for name, value in right.items():
        groups[group(name)].append(value)
    totals = np.array([[sum(values), len(values)] for values in groups.values()])
    draws = np.random.default_rng(0).integers(len(totals), size=(10_000, len(totals)))
    drawn = totals[draws].sum(1)
    low, high = np.percentile(100 * drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return {
        "accuracy": round(100 * sum(right.values()) / len(right), 2),
        "interval_95": [round(float(low), 2), round(float(high), 2)],
        "answers": len(right),
        "drawn_independently": len(groups),
    }


def vqa_answers(name: str, shards: str, *options: str) -> dict[str, str]:
    """question_id -> answer, as the submission file has them."""
    out = ROOT / "runs" / name / "submission.json"
    run(*PYTHON, "vlmo_ds.evaluation.vqa", f"runs/{name}", "--shards", shards, "--submission", out, *options)
    return {str(row["question_id"]): row["answer"] for row in json.loads(out.read_text())}


def easy_vqa_answered(root: Path, name: str, *options: str) -> dict:
    triples = json.loads((root / "easy_vqa" / "test_questions.json").read_text())
    answers = vqa_answers(name, "data/easy_vqa/test", *options)
    right = {str(number): answers[str(number)] == answer for number, (_, answer, _) in enumerate(triples)}
    return {"run": name, **summary(right, lambda number: str(triples[int(number)][2]))}


def easy_vqa(root: Path) -> list[dict]:
    for split in ("train", "test"):
        prepare("easy_vqa", root, split, f"data/easy_vqa/{split}")
    train("finetune/easy_vqa")
    return [easy_vqa_answered(root, "easy_vqa")]


def blip_easy_vqa(root: Path) -> list[dict]:
    for split in ("train", "test"):
        prepare("easy_vqa", root, split, f"data/easy_vqa/{split}")
    prepare("easy_vqa", root, "train", "data/easy_vqa/train_shapes", "--questions", SHAPES)
    train("finetune/blip_easy_vqa")
    noted = json.loads((ROOT / "runs/blip_easy_vqa/stages.json").read_text())
    training = {"seconds_of_training": round(sum(stage["seconds"] for stage in noted.values()), 1)}
    methods = ("list", "generate")
    every = [easy_vqa_answered(root, "blip_easy_vqa", "--method", method) for method in methods]
    return [{**found, "method": method, **training} for method, found in zip(methods, every, strict=True)]


def nlvr1(root: Path) -> list[dict]:
    for kind in ("captions", "annotations", "questions", "pairs"):
        prepare("nlvr1", root, "dev", f"data/nlvr1/{kind}-dev", "--kind", kind, "--augment")
    for kind in ("questions", "pairs"):
        prepare("nlvr1", root, "hidden", f"data/nlvr1/{kind}-hidden", "--kind", kind)
    train("nlvr1")
    examples = [json.loads(line) for line in (root / "nlvr1" / "hidden.json").read_text().splitlines()]
    labels = {e["identifier"]: e["label"] for e in examples}
    towers = {e["identifier"]: scene(e["structured_rep"])[0] for e in examples}

    def example(identifier: str) -> str:
        return "-".join(identifier.split("-")[1:3])  # hidden-<presentation>-<example>-<order of the boxes>

    def presentation(identifier: str) -> str:
        return identifier.split("-")[1]

    def row(right: Mapping[str, bool], **run: str) -> dict:
        judged = [{"sentence_id": presentation(i), "label": True, "predicted": value} for i, value in right.items()]
        return {
            **run,
            **summary(right, presentation),
            "consistency": round(scores(judged)["consistency"], 2),
            "towers": summary({i: value for i, value in right.items() if towers[example(i)]}, presentation),
            "scattered": summary({i: value for i, value in right.items() if not towers[example(i)]}, presentation),
        }

    rows = []
    for start, overrides in (("pretrained", []), ("from scratch", ["init.weights=fresh"])):
        for kind, task in (("questions", "vqa"), ("pairs", "nlvr2")):
            name = f"nlvr1_{kind}" + ("_fresh" if overrides else "")
            train(f"finetune/nlvr1_{kind}", f"name={name}", *(f"stages.{task}.{o}" for o in overrides))
            if task == "vqa":
                answers = vqa_answers(name, f"data/nlvr1/{kind}-hidden")
            else:
                out = ROOT / "runs" / name / "predictions.csv"
                run(*PYTHON, "vlmo_ds.evaluation.nlvr2", f"runs/{name}", "--predictions", out)
                answers = dict(line.lower().split(",") for line in out.read_text().split())
            right = {i: answer == labels[example(i)] for i, answer in answers.items()}
            rows.append(row(right, run=name, start=start))
    return [*rows, row({i: labels[example(i)] == "true" for i in right}, run="always true")]


PARTS = {"easy_vqa": easy_vqa, "blip_easy_vqa": blip_easy_vqa, "nlvr1": nlvr1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the downloads easy_vqa and nlvr1")
    parser.add_argument("--only", choices=PARTS, help="one of them (default: all)")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    results = [row for name in ([args.only] if args.only else PARTS) for row in PARTS[name](args.root.resolve())]
    for row in results:
        print(json.dumps(row))
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
