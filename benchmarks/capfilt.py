"""CapFilt's whole chain (launch/capfilt.sh) and what it brings: the filter against the truth, and pretraining before and after.

    python benchmarks/capfilt.py [--output FILE]

Of the held-out scenes the share whose image is the first that its caption finds (re-ranked), and the share of captions that are wholly right,
of the model pretrained on the noisy set and of the one pretrained for as many steps on what the filter kept; each with a 95% interval by
10,000 bootstrap samples of the scenes. Data goes to data/synthetic_web, runs to runs/capfilt_*: what is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np
from common import write_results

from vlmo_ds.evaluation import captioning, meaning, retrieval, runs

ROOT = Path(__file__).resolve().parents[1]


def interval(hits: np.ndarray) -> dict[str, float]:
    """Mean in percent, and the bounds of its 95% interval."""
    draws = np.random.default_rng(0).integers(0, len(hits), (10_000, len(hits)))
    low, high = np.percentile(hits[draws].mean(1), [2.5, 97.5])
    return {name: round(100 * float(value), 2) for name, value in (("mean", hits.mean()), ("low", low), ("high", high))}


def of_run(run: Path) -> dict[str, dict[str, float]]:
    _, recipe, model, tokenizer = runs.open_run(run, "match")
    data = retrieval.load_set(recipe.retrieval, recipe.model.image_size, recipe.model.max_text_len, tokenizer)
    scores = retrieval.evaluate(model, data, recipe.retrieval, model.collector).text_to_image
    found = scores.argmax(1) == data.image_of_text
    captioned = captioning.evaluate(model, recipe.captioning, tokenizer, model.collector)
    right = [meaning.judge([one.written[0]], [one.scene])["wholly right"] / 100 for one in captioned]
    return {"R@1": interval(found.numpy().astype(float)), "wholly right": interval(np.array(right))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    start = time.perf_counter()
    subprocess.run(["bash", "launch/capfilt.sh"], cwd=ROOT, check=True)
    seconds = round(time.perf_counter() - start, 1)
    web = ROOT / "data/synthetic_web"
    results = {
        "seconds": seconds,
        "filter": {
            name: json.loads((web / f"{name}_clean/capfilt.json").read_text())["truth"] for name in ("web", "one")
        },
        **{name: of_run(ROOT / f"runs/capfilt_{name}") for name in ("noisy", "clean")},
    }
    print(json.dumps(results, indent=1))
    if args.output:
        write_results(args.output, [results])


if __name__ == "__main__":
    main()
