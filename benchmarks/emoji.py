"""Does pretraining beat a fresh start? Emoji of one style of drawing, found by their names after a pretraining on another style.

    python benchmarks/emoji.py --root FOLDER [--output FILE]

FOLDER holds the unpacked npm packages emoji-datasource-google, emoji-datasource-twitter and cldr-annotations-full (docs/data.md).
Both starts train stage `twitter` of launch/recipes/emoji.yaml: the same data, word pieces, steps and settings. The pretraining is the stage
before it: Google's pictures of all emoji, with their names. What is measured are Twitter's pictures of those emoji that the stage leaves out:
neither start has seen them, the pretraining has seen the same emoji in the other style.
"""

from __future__ import annotations

from pathlib import Path

from pretraining import SEEDS, command, prepare, row, train


def pretrained(root: Path, seed: int) -> str:
    """The run of emoji.yaml with this seed."""
    prepare("emoji", root, "data/emoji/google", "--style", "google")
    for split in ("train", "test"):
        prepare("emoji", root, f"data/emoji/twitter-{split}", "--style", "twitter", "--split", split)
    return train("emoji", f"emoji_{seed}", f"seed={seed}")


def made(root: Path) -> list[dict]:
    before, fresh = [], []
    for seed in SEEDS:
        before.append(pretrained(root, seed))
        options = ["--stages", "twitter", "stages.twitter.init.weights=fresh", f"tokenizer.name={before[-1]}/tokenizer"]
        fresh.append(train("emoji", f"emoji_fresh_{seed}", f"seed={seed}", *options))
    return [
        row("pretrained", before, "google", "twitter"),
        row("fresh", fresh, "twitter"),
        row("pretrained, without the last stage", before, "google"),
    ]


if __name__ == "__main__":
    command(__doc__, made)
