"""VLMo's quickstart with an image stage that predicts visual tokens, beside its own, which predicts pixels.

    python benchmarks/visual_tokens.py [--image_steps 80] [--output FILE]

The same data, steps and settings but for the target of the image stage, three seeds; --image_steps: of that stage, of both. The tokens are those of the first two runs of
launch/beit3_quickstart.sh, a teacher that contrast has trained and its tokenizer, which are trained here where they are not yet there; no seed of
the quickstart changes them. R@1 after the last stage, re-ranked as the recipe says, over 256 held-out scenes. data/synthetic has to be there; runs go to
runs/tokens_*, and those that are there go on or are taken as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretraining import SEEDS, gain, row, told, train

from vlmo_ds.evaluation.report import read_metrics

TOKENIZER = "beit3_quickstart_tokenizer"
STAGES = ("image", "text", "words", "contrast", "joint")
ON_TOKENS = ["model.mim_target=tokens", "model.num_visual_tokens=256", f"model.visual_tokenizer=runs/{TOKENIZER}"]


def masked_patches(folders: list[str]) -> dict:
    """How many of the masked patches the end of the image stage finds, mean of its last tenth, of each seed."""
    found = []
    for folder in folders:
        shares = [record["mim/accuracy"] for record in read_metrics(Path(folder))["image"]]
        last = shares[-max(1, len(shares) // 10) :]
        found.append(round(100 * sum(last) / len(last), 1))
    return {"masked patches whose token is found, percent": found, "by chance": round(100 / 256, 2)}


def made(steps: int) -> list[dict]:
    """The rows; steps: of the image stage."""
    for name in ("beit3_quickstart_teacher", TOKENIZER):
        train(f"beit3_quickstart/{name}", name)
    runs = {
        target: [
            train("quickstart", f"tokens_{target}_{steps}_{seed}", f"seed={seed}", f"stages.image.steps={steps}", *of)
            for seed in SEEDS
        ]
        for target, of in (("pixels", []), ("tokens", ON_TOKENS))
    }
    results = [row(target, folders, *STAGES) for target, folders in runs.items()]
    results[1] |= masked_patches(runs["tokens"])
    results.append(gain(runs["tokens"], runs["pixels"], STAGES[-1]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_steps", type=int, default=80, help="default: %(default)s, as in the quickstart")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    told(args.output, lambda: made(args.image_steps))


if __name__ == "__main__":
    main()
