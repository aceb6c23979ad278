"""Does pretraining beat a fresh start? Emoji of one style of drawing, found by their names after a pretraining on another style.

    python benchmarks/emoji.py --root FOLDER [--output FILE]

FOLDER holds the unpacked npm packages emoji-datasource-google, emoji-datasource-twitter and cldr-annotations-full (docs/data.md).
Both starts train stage `twitter` of launch/recipes/emoji.yaml: the same data, word pieces, steps and settings. The pretraining is the stage
before it: Google's pictures of all emoji, with their names. What is measured are Twitter's pictures of those emoji that the stage leaves out:
neither start has seen them, the pretraining has seen the same emoji in the other style. Two more rows: what each kind of word pieces, learnt
from names and keywords in three scripts, makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pretraining import SEEDS, command, gain, prepare, row, train

from vlmo_ds.config import TokenizerKind
from vlmo_ds.data.shards import list_shards
from vlmo_ds.data.tokenizer import train_tokenizer


def pretrained(root: Path, seed: int) -> str:
    """The run of emoji.yaml with this seed."""
    prepare("emoji", root, "data/emoji/google", "--style", "google")
    for split in ("train", "test"):
        prepare("emoji", root, f"data/emoji/twitter-{split}", "--style", "twitter", "--split", split)
    return train("emoji", f"emoji_{seed}", f"seed={seed}")


def written(root: Path, kind: TokenizerKind, vocab_size: int = 3000) -> dict:
    """Names and keywords in Japanese, Arabic and Hindi through word pieces that were learnt from them."""
    prepare("emoji", root, "data/emoji/scripts", "--style", "google", "--language", "ja,ar,hi", "--captions", "both")
    shards = list_shards(["data/emoji/scripts"])
    captions = [caption for shard in shards for place in range(shard.samples) for caption in shard.read(place).captions]
    tokenizer = train_tokenizer(captions, vocab_size, kind)
    encoded = [tokenizer(caption)["input_ids"] for caption in captions]
    read_back = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
    return {
        "word_pieces": kind,
        "vocab_size": len(tokenizer),
        "captions": len(captions),
        "pieces_a_caption": round(sum(len(ids) - 2 for ids in encoded) / len(encoded), 2),
        "captions_with_unknown_pieces": sum(tokenizer.unk_token_id in ids for ids in encoded),
        "captions_read_back_as_written": sum(one == other for one, other in zip(captions, read_back, strict=True)),
    }


def made(root: Path) -> list[dict]:
    before, fresh = [], []
    for seed in SEEDS:
        before.append(pretrained(root, seed))
        options = ["--stages", "twitter", "stages.twitter.init.weights=fresh", f"tokenizer.name={before[-1]}/tokenizer"]
        fresh.append(train("emoji", f"emoji_fresh_{seed}", f"seed={seed}", *options))
    return [
        row("pretrained", before, "google", "twitter"),
        row("fresh", fresh, "twitter"),
        gain(before, fresh, "twitter"),
        row("pretrained, without the last stage", before, "google"),
        *(written(root, kind) for kind in get_args(TokenizerKind)),
    ]


if __name__ == "__main__":
    command(__doc__, made)
