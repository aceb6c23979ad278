"""The `vlmo` command: vlmo NAME [arguments], or python -m vlmo_ds NAME [arguments]."""

from __future__ import annotations

import importlib
import runpy
import sys

# Name -> (module, what it does). A module is run as `python -m module` is.
COMMANDS = {
    "train": ("vlmo_ds.training.command", "pretrain or fine-tune: what train_ds.py does, under any launcher"),
    "quickstart": ("vlmo_ds.quickstart", "make data and pretrain a small model on it, with a report at the end"),
    "recipe": ("vlmo_ds.recipe", "print every setting with its meaning, or a recipe as it is resolved"),
    "plan": ("vlmo_ds.planning.plan", "memory, bytes on the wire, time and cost of a recipe on so many GPUs"),
    "doctor": ("vlmo_ds.planning.doctor", "look at data and settings, and let every task learn one batch by heart"),
    "compare": (
        "vlmo_ds.planning.compare",
        "lay a run's curves over those of runs that went well, and say what is not as there",
    ),
    "preflight": ("vlmo_ds.planning.preflight", "look at the machines before a run"),
    "supervise": ("vlmo_ds.planning.supervise", "start a run again when it falls"),
    "checkpoint": ("vlmo_ds.training.checkpoint", "one file of weights from a checkpoint"),
    "prepare": ("vlmo_ds.data.prepare", "turn datasets into shards"),
    "index": ("vlmo_ds.data.index", "build the index of shards"),
    "tokenize": ("vlmo_ds.evaluation.tokenize", "visual tokens of shards' images, by a finished tokenizer"),
    "inspect": ("vlmo_ds.data.inspect", "a page about a set of shards"),
    "evaluate retrieval": ("vlmo_ds.evaluation.retrieval", "image-text retrieval of a finished run"),
    "evaluate vqa": ("vlmo_ds.evaluation.vqa", "questions about images"),
    "evaluate nlvr2": ("vlmo_ds.evaluation.nlvr2", "sentences about pairs of images"),
    "evaluate captioning": ("vlmo_ds.evaluation.captioning", "captions for images, and their scores"),
    "evaluate classification": ("vlmo_ds.evaluation.classification", "classification by a trained head"),
    "evaluate zero_shot": ("vlmo_ds.evaluation.zero_shot", "classification by the names of the classes"),
    "capfilt": ("vlmo_ds.evaluation.capfilt", "write captions for a shard set, and leave out those that do not fit"),
    "search": ("vlmo_ds.evaluation.search", "find photographs in a folder by words"),
    "export": ("vlmo_ds.interop.export", "a finished run as a Hugging Face model"),
    "parity": ("vlmo_ds.interop.parity", "compare with recorded numbers of the official code"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "usage: vlmo NAME [arguments]; vlmo NAME --help\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("vlmo_ds"))
        return 0
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    if name is None:
        from vlmo_ds.config import nearest

        word = " ".join(words[:2]) if words[0] == "evaluate" else words[0]
        print(f"error: '{word}' is no command{nearest(word, COMMANDS)}\n{usage()}", file=sys.stderr)
        return 2
    module = COMMANDS[name][0]
    rest = words[len(name.split()) :]
    sys.argv = [f"vlmo {name}", *rest]
    if name == "train":
        return importlib.import_module(module).main(rest)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
