"""launch/beit3_quickstart.sh, run by run: its time, what the visual tokenizer uses of its codes, and what the pretraining is worth.

    python benchmarks/beit3_quickstart.py [--seeds 0] [--pair_views two] [--output FILE]

Teacher, tokenizer, pretraining, then retrieval and captions from the pretrained weights and, by the same settings, steps and seeds, from random
ones. Retrieval over 256 held-out scenes by contrast; captions of the same scenes, objects/F1 and what else captioning.json has. data/synthetic has
to be there; runs go to runs/beit3q_*, and those that are there go on or are taken as they are: their seconds are then not those of a whole run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

from pretraining import told, train

from vlmo_ds.evaluation.report import read_metrics
from vlmo_ds.families.beit3.config import BEiT3Settings

MEASURED = {"retrieval": "retrieval.json", "captions": "captioning.json"}
LAST = 50  # steps of a stage whose shares are averaged


def trained(part: str, seed: int, *options: str, name: str = "") -> tuple[str, float]:
    """(the run's folder, seconds)."""
    recipe = "beit3_quickstart" + (f"_{part}" if part else "")
    start = time.perf_counter()
    folder = train(
        f"beit3_quickstart/{recipe}", f"beit3q_{name or part or 'pretraining'}_{seed}", f"seed={seed}", *options
    )
    return folder, round(time.perf_counter() - start, 1)


def end_of(folder: str) -> dict[str, float]:
    """Shares of the last steps of the pretraining, mean."""
    rows = read_metrics(Path(folder))["pretrain"][-LAST:]
    shares = [name for name in rows[-1] if name.endswith("accuracy")]
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in shares}


def codes_used(tokenizer: str, seed: int) -> dict[str, float]:
    """By the training images."""
    command = [sys.executable, "-m", "vlmo_ds.evaluation.tokenize", tokenizer, "--shards", "data/synthetic/train"]
    done = subprocess.run(
        [*command, "--output", f"runs/beit3q_tokens_{seed}"], check=True, stdout=subprocess.PIPE, text=True
    )
    found = re.search(r"(\d+) of (\d+) codes are used, perplexity ([\d.]+)", done.stdout)
    if not found:
        sys.exit(f"error: vlmo tokenize printed {done.stdout!r}")
    used, codes, perplexity = map(float, found.groups())
    return {"codes": codes, "used, percent": round(100 * used / codes, 1), "perplexity": perplexity}


def of_seed(seed: int, views: str) -> dict:
    teacher, first = trained("teacher", seed)
    tokenizer, second = trained("tokenizer", seed, f"model.teacher={teacher}")
    after = "" if views == "two" else f"_{views}_view"  # in names of runs
    of_pairs = [f"model.visual_tokenizer={tokenizer}", f"model.pair_views={views}"]
    pretrained, third = trained("", seed, *of_pairs, name=f"pretraining{after}")
    result: dict = {
        "seed": seed,
        "pair_views": views,
        "seconds": {"teacher": first, "tokenizer": second, "pretraining": third},
        "tokenizer": codes_used(tokenizer, seed),
        f"pretraining, last {LAST} steps": end_of(pretrained),
    }
    for part, file in MEASURED.items():
        words = f"tokenizer.name={pretrained}/tokenizer"
        weights = f"stages.{part}.init.weights={pretrained}/checkpoints/pretrain/final"
        folder, result["seconds"][part] = trained(part, seed, words, weights, name=f"{part}{after}")
        starts = {"pretrained": folder}
        if not after:
            starts["fresh"], _ = trained(
                part, seed, words, f"stages.{part}.init={{weights: fresh}}", name=f"{part}_fresh"
            )
        result[part] = {start: json.loads(Path(of, file).read_text()) for start, of in starts.items()}
    result["seconds"]["all"] = round(sum(result["seconds"].values()), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--pair_views",
        choices=get_args(BEiT3Settings.model_fields["pair_views"].annotation),
        default="two",
        help="of the pretraining's pairs; one: without the runs from random weights (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    told(args.output, lambda: [of_seed(seed, args.pair_views) for seed in args.seeds])


if __name__ == "__main__":
    main()
