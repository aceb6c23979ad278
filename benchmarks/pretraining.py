"""What benchmarks of trainings share. Of emoji.py and stamps.py: a recipe's last stage after its pretraining and from random weights, by the same
settings, steps and seeds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from common import write_results
from torch import Tensor

from vlmo_ds.evaluation import retrieval, runs

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)


def run(*command: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True)


def prepare(dataset: str, root: Path, output: str, *options: object) -> None:
    """A set that is there already is taken as it is."""
    if not (Path(output) / "index.json").exists():
        run("-m", "vlmo_ds.data.prepare", dataset, "--root", root, "--output", output, *options)


def train(recipe: str, name: str, *options: str) -> str:
    """One process, which goes on where it stopped. Returns the run's folder."""
    configs = ["--deepspeed_config", "ds_configs/zero2.json", "--recipe", f"launch/recipes/{recipe}.yaml"]
    run("train_ds.py", *configs, "--output_dir", f"runs/{name}", *options)
    return f"runs/{name}"


def ranks(score_QC: Tensor) -> np.ndarray:
    """[Q] how many candidates are scored above a query's own, which has the same number; those with the same score count half."""
    own_Q1 = score_QC.diagonal()[:, None]
    above, same = (score_QC > own_Q1).sum(1), (score_QC == own_Q1).sum(1) - 1
    return (above + 0.5 * same).cpu().numpy()


@cache
def searched(folder: str) -> dict[str, np.ndarray]:
    """Direction -> ranks of the run's held-out pictures and captions, one of each for every thing."""
    _, recipe, model, tokenizer = runs.open_run(Path(folder), "encode_text", None)
    data = retrieval.load_set(recipe.retrieval, recipe.model.image_size, recipe.model.max_text_len, tokenizer)
    if len(data.captions) != len(data.images):
        sys.exit(
            f"error: {folder}: {len(data.captions)} captions of {len(data.images)} held-out pictures, not one of each"
        )
    found = retrieval.evaluate(model, data, recipe.retrieval, model.collector)
    return {name: ranks(getattr(found, name)) for name in ("text_to_image", "image_to_text")}


def ranks_of(folders: list[str], stage: str) -> dict[str, np.ndarray]:
    """Direction -> [S, Q] of the runs of S seeds after a stage."""
    every = [searched(f"{folder}/checkpoints/{stage}/final") for folder in folders]
    return {direction: np.stack([found[direction] for found in every]) for direction in every[0]}


def mean(value_SQ: np.ndarray) -> dict:
    """Percent; the interval is a percentile bootstrap over the queries, each with all seeds."""
    value_Q = 100 * value_SQ.mean(0)
    drawn = value_Q[np.random.default_rng(0).integers(len(value_Q), size=(10_000, len(value_Q)))].mean(1)
    return {
        "mean": round(float(value_Q.mean()), 2),
        "interval_95": [round(float(end), 2) for end in np.percentile(drawn, [2.5, 97.5])],
        "seeds": [round(100 * float(value), 2) for value in value_SQ.mean(1)],
    }


def row(start: str, folders: list[str], *stages: str) -> dict:
    """What the runs of one start reach after the last of these stages, and the seconds that each of them took, mean of the seeds."""
    noted = [json.loads((Path(folder) / "stages.json").read_text()) for folder in folders]
    seconds = {stage: round(float(np.mean([found[stage]["seconds"] for found in noted])), 1) for stage in stages}
    found = ranks_of(folders, stages[-1])
    recalls = {way: {f"R@{k}": mean(rank < k) for k in retrieval.RANKS} for way, rank in found.items()}
    return {"start": start, "queries": found["text_to_image"].shape[1], "seconds": seconds, **recalls}


def gain(folders: list[str], others: list[str], stage: str) -> dict:
    """By how much the former are better after a stage, each query compared with itself."""
    ours, theirs = ranks_of(folders, stage), ranks_of(others, stage)
    recalls = {
        way: {f"R@{k}": mean((ours[way] < k).astype(float) - (theirs[way] < k)) for k in retrieval.RANKS}
        for way in ours
    }
    return {"start": "difference, query by query", "queries": ours["text_to_image"].shape[1], **recalls}


def told(output: Path | None, made: Callable[[], list[dict]]) -> None:
    """Makes results where recipes look for data, prints them, and writes them to a file where one is named."""
    output = output and output.resolve()
    os.chdir(ROOT)
    results = made()
    for result in results:
        print(json.dumps(result))
    if output:
        write_results(output, results)


def command(about: str | None, made: Callable[[Path], list[dict]]) -> None:
    """The command line of a benchmark. made: the rows, of the folder of the unpacked packages."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    root = args.root.resolve()
    told(args.output, lambda: made(root))
