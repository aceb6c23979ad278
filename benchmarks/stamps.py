"""Does pretraining on emoji beat a fresh start? Tux Paint's stamps with English sentences, held-out ones found by theirs.

    python benchmarks/stamps.py --root FOLDER [--output FILE]

FOLDER holds the unpacked Debian package tuxpaint-stamps-default in a folder stamps, and the npm packages of benchmarks/emoji.py in a folder
emoji (docs/data.md). Both starts train launch/recipes/stamps.yaml: the same data, word pieces, steps and settings. The pretraining is
launch/recipes/emoji.yaml: the runs of benchmarks/emoji.py, made here where they are not there.
"""

from __future__ import annotations

from pathlib import Path

from emoji import pretrained
from pretraining import SEEDS, command, gain, prepare, row, train


def made(root: Path) -> list[dict]:
    for split in ("train", "test"):
        prepare("stamps", root / "stamps", f"data/stamps/{split}", "--split", split, "--resize", 64)
    starts: dict[str, list[str]] = {"pretrained": [], "fresh": []}
    for seed in SEEDS:
        before = pretrained(root / "emoji", seed)
        for start, weights in (("pretrained", f"{before}/checkpoints/twitter/final"), ("fresh", "fresh")):
            options = [f"seed={seed}", f"tokenizer.name={before}/tokenizer", f"stages.stamps.init.weights={weights}"]
            starts[start].append(train("stamps", f"stamps_{start}_{seed}", *options))
    rows = [row(start, folders, "stamps") for start, folders in starts.items()]
    return [*rows, gain(starts["pretrained"], starts["fresh"], "stamps")]


if __name__ == "__main__":
    command(__doc__, made)
