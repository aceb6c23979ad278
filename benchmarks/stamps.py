"""Does pretraining on emoji beat a fresh start? Tux Paint's stamps with English sentences, held-out ones found by theirs.

    python benchmarks/stamps.py --root FOLDER [--output FILE]

FOLDER holds the unpacked Debian package tuxpaint-stamps-default in a folder stamps, and in a folder emoji the npm packages of
benchmarks/emoji.py, emoji-datasource-apple and emoji-datasource-facebook (docs/data.md). Both starts train stage `stamps` of
launch/recipes/stamps.yaml: the same data, word pieces, steps and settings. The pretraining is the stage before it: emoji in four styles of
drawing, with their names and keywords.
"""

from __future__ import annotations

from pathlib import Path

from pretraining import SEEDS, command, gain, prepare, row, train

STYLES = ("google", "twitter", "apple", "facebook")


def made(root: Path) -> list[dict]:
    for style in STYLES:
        options = ["--style", style, "--captions", "both", "--resize", 64]
        prepare("emoji", root / "emoji", f"data/emoji/all-{style}", *options)
    for split in ("train", "test"):
        prepare("stamps", root / "stamps", f"data/stamps/{split}", "--split", split, "--resize", 64)
    before, fresh = [], []
    for seed in SEEDS:
        before.append(train("stamps", f"stamps_{seed}", f"seed={seed}"))
        options = ["--stages", "stamps", "stages.stamps.init.weights=fresh", f"tokenizer.name={before[-1]}/tokenizer"]
        fresh.append(train("stamps", f"stamps_fresh_{seed}", f"seed={seed}", *options))
    rows = [row("pretrained", before, "emoji", "stamps"), row("fresh", fresh, "stamps")]
    return [*rows, gain(before, fresh, "stamps")]


if __name__ == "__main__":
    command(__doc__, made)
