"""What emoji.py and stamps.py share: a recipe's last stage after its pretraining and from random weights, by the same settings, steps and seeds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
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


def recall(rank_SQ: np.ndarray, k: int) -> dict:
    """Of so many seeds and queries; the interval is a percentile bootstrap over the queries, each with all seeds."""
    hit_Q = 100 * (rank_SQ < k).mean(0)
    drawn = hit_Q[np.random.default_rng(0).integers(len(hit_Q), size=(10_000, len(hit_Q)))].mean(1)
    return {
        "mean": round(float(hit_Q.mean()), 2),
        "interval_95": [round(float(value), 2) for value in np.percentile(drawn, [2.5, 97.5])],
        "seeds": [round(100 * float((rank_Q < k).mean()), 2) for rank_Q in rank_SQ],
    }


def row(start: str, folders: list[str], *stages: str) -> dict:
    """What the runs of one start reach after the last of these stages, and the seconds that each of them took, mean of the seeds."""
    every = [searched(f"{folder}/checkpoints/{stages[-1]}/final") for folder in folders]
    noted = [json.loads((Path(folder) / "stages.json").read_text()) for folder in folders]
    seconds = {stage: round(float(np.mean([found[stage]["seconds"] for found in noted])), 1) for stage in stages}
    found = {"start": start, "queries": len(every[0]["text_to_image"]), "seeds": len(folders), "seconds": seconds}
    for direction in every[0]:
        rank_SQ = np.stack([each[direction] for each in every])
        found[direction] = {f"R@{k}": recall(rank_SQ, k) for k in retrieval.RANKS}
    return found


def command(about: str | None, made: Callable[[Path], list[dict]]) -> None:
    """The command line of a benchmark. made: the rows, of the folder of the unpacked packages."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    output = args.output and args.output.resolve()
    root = args.root.resolve()
    os.chdir(ROOT)  # where recipes look for data
    results = made(root)
    for result in results:
        print(json.dumps(result))
    if output:
        write_results(output, results)
