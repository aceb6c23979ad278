"""VLMo's kinds of contrast on the synthetic world: the quickstart's last two stages with each of them, from the same weights.

    python benchmarks/contrast_kinds.py [--seeds 0] [--output FILE]

softmax: CLIP's; sigmoid: SigLIP's (model.itc_kind); image: the softmax with every pair of the same picture as a positive (model.positives). R@1
of the contrast and of re-ranking, percent of 256 held-out scenes. data/synthetic has to be there; runs go to runs/kinds_*, and those that are
there go on or are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from common import write_results
from pretraining import ROOT, train

BEFORE = ("image", "text", "words")  # stages that all kinds share
KINDS = {
    "softmax": [],
    "sigmoid": ["model.itc_kind=sigmoid", "stages.contrast.init.fresh=[itc_*,logit_*scale,logit_*bias]"],
    "image": ["model.positives=image"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    output = args.output and args.output.resolve()
    os.chdir(ROOT)  # where recipes look for data
    results = []
    for seed in args.seeds:
        shared = train("quickstart", f"kinds_words_{seed}", f"seed={seed}", "--stages", ",".join(BEFORE))
        start = [f"tokenizer.name={shared}/tokenizer", f"stages.contrast.init.weights={shared}/checkpoints/words/final"]
        for kind, settings in KINDS.items():
            left_out = [f"stages.{stage}=null" for stage in BEFORE]
            run = train("quickstart", f"kinds_{kind}_{seed}", f"seed={seed}", *left_out, *start, *settings)
            found = json.loads(Path(run, "retrieval.json").read_text())
            recall = {
                way: {by: found[way][by]["R@1"] for by in found[way]} for way in ("text_to_image", "image_to_text")
            }
            results.append({"kind": kind, "seed": seed, "settings": settings, "R@1": recall})
            print(json.dumps(results[-1]), flush=True)
    if output:
        write_results(output, results)


if __name__ == "__main__":
    main()
