"""Hands a trained model to other code: a Hugging Face folder, or one file with the official parameter names.

    python -m vlmo_ds.interop.export RUN --output FOLDER
    python -m vlmo_ds.interop.export RUN --official FILE.pt [--half]

RUN is a run's directory (its last finished stage is taken) or checkpoints/<stage>/final inside it. The folder has
config.json, model.safetensors, the tokenizer and the processor; the file has the weights under "state_dict".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from vlmo_ds.config import RecipeError
from vlmo_ds.data.tokenizer import load_tokenizer
from vlmo_ds.evaluation.runs import find_stage
from vlmo_ds.evaluation.vqa import read_answers
from vlmo_ds.weights_file import read_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or checkpoints/<stage>/final inside it")
    parser.add_argument("--output", type=Path, help="folder for transformers; must not be there yet")
    parser.add_argument("--official", type=Path, help="file with the official parameter names")
    parser.add_argument("--half", action="store_true", help="the official file's weights in float16")
    args = parser.parse_args(argv)
    if not args.output and not args.official:
        parser.error("nothing to write: give --output, --official or both")
    try:
        run, recipe, folder = find_stage(args.run)
        stage = next(s for s in recipe.stages if s.name == folder.parent.name)
        weights = read_weights(folder)
        if args.output:
            if args.output.exists():
                raise RecipeError(f"--output: {args.output} is there already: name a new folder")
            answers = read_answers(run, recipe.model.vqav2_label_size) if "questions" in stage.reads else None
            tokenizer = load_tokenizer(str(run / "tokenizer"), *recipe.family.tokenizer)
            export = recipe.family.huggingface().exported
            model = export(weights, recipe.model, list(stage.tasks), tokenizer, answers, args.output)
            print(
                f"{args.output}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
            )
        if args.official:
            write_official(weights, args.official, args.half)
            print(f"{args.official}: {len(weights)} tensors under their official names")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_official(weights: dict[str, Tensor], file: Path, half: bool = False) -> None:
    """As VLMo's releases: {"state_dict": {name: tensor}}, published in one rename."""
    kept = {name: value.half() if half and value.is_floating_point() else value for name, value in weights.items()}
    temporary = file.with_name(file.name + ".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": kept}, temporary)
    temporary.replace(file)


if __name__ == "__main__":
    sys.exit(main())
