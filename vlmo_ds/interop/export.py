"""Hands a trained model to other code: a Hugging Face folder, one file with the official parameter names, or an open_clip folder.

    python -m vlmo_ds.interop.export RUN --output FOLDER
    python -m vlmo_ds.interop.export RUN --official FILE.pt [--half]
    python -m vlmo_ds.interop.export RUN --open_clip FOLDER

RUN is a run's directory (its last finished stage is taken) or checkpoints/<stage>/final inside it. The folder has
config.json, model.safetensors, the tokenizer and the processor; the file has the weights as the reference's own files do. open_clip reads its
folder as open_clip.create_model("local-dir:FOLDER"); families whose models it knows can be written so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmo_ds.config import ModelConfig, RecipeError
from vlmo_ds.data.tokenizer import ClipTokenizer, load_tokenizer
from vlmo_ds.evaluation.runs import choose_weights
from vlmo_ds.evaluation.vqa import read_answers
from vlmo_ds.families.finished import find_stage
from vlmo_ds.families.huggingface import appearing
from vlmo_ds.families.interface import Family
from vlmo_ds.weights_file import read_weights

OPEN_CLIPS_OWN = 49408  # words of the vocabulary that open_clip has in itself


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory, or checkpoints/<stage>/final inside it")
    choose_weights(parser)
    parser.add_argument("--output", type=Path, help="folder for transformers; must not be there yet")
    parser.add_argument("--official", type=Path, help="file with the official parameter names")
    parser.add_argument("--open_clip", type=Path, metavar="FOLDER", help="folder for open_clip; must not be there yet")
    parser.add_argument("--half", action="store_true", help="the official file's weights in float16")
    args = parser.parse_args(argv)
    if not (args.output or args.official or args.open_clip):
        parser.error("nothing to write: give --output, --official or --open_clip")
    try:
        run, recipe, folder = find_stage(args.run, weights=args.weights)
        stage = next(s for s in recipe.stages if s.name == folder.parent.name)
        weights = read_weights(folder)
        tokenizer = load_tokenizer(str(run / "tokenizer"), *recipe.family.tokenizer)
        for name in ("output", "open_clip"):
            if (wanted := getattr(args, name)) and wanted.exists():
                raise RecipeError(f"--{name}: {wanted} is there already: name a new folder")
        if args.output:
            answers = read_answers(run, recipe.model.vqav2_label_size) if "questions" in stage.reads else None
            export = recipe.family.huggingface().exported
            model = export(weights, recipe.model_of(stage), list(stage.tasks), tokenizer, answers, args.output)
            print(
                f"{args.output}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
            )
        if args.official:
            count = write_official(recipe.family.weights().official(weights), args.official, args.half)
            print(f"{args.official}: {count} tensors under their official names")
        if args.open_clip:
            note = write_open_clip(weights, recipe.model_of(stage), recipe.family, tokenizer, args.open_clip)
            print(f"{args.open_clip}: open_clip.create_model('local-dir:{args.open_clip}')")
            if note:
                print(note)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_official(found: dict[str, dict[str, Tensor]], file: Path, half: bool = False) -> int:
    """A file such as the reference's: one key, and under it names and tensors; published in one rename. How many there are."""
    ((key, weights),) = found.items()
    kept = {name: value.half() if half and value.is_floating_point() else value for name, value in weights.items()}
    temporary = file.with_name(file.name + ".tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: kept}, temporary)
    temporary.replace(file)
    return len(kept)


def write_open_clip(
    weights: dict[str, Tensor],
    settings: ModelConfig,
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> str:
    """Configuration and weights, and the tokenizer where it is not CLIP's, which open_clip has; published in one rename.
    Returns what open_clip has to be told besides."""
    if family.open_clip is None:
        raise RecipeError(
            f"--open_clip: open_clip has no models of family {family.name}; accepted: --output, --official"
        )
    mean, std = family.pixels
    model, note = family.open_clip(settings)
    with appearing(folder) as temporary:
        if not isinstance(tokenizer, ClipTokenizer) or len(tokenizer) != OPEN_CLIPS_OWN:
            tokenizer.save_pretrained(str(temporary))
            model["text_cfg"]["hf_tokenizer_name"] = folder.name  # any name: it takes the one in the folder
            model["text_cfg"]["pad_id"] = tokenizer.pad_token_id or 0
        config = {"model_cfg": model, "preprocess_cfg": {"mean": mean, "std": std, "resize_mode": "squash"}}
        (temporary / "open_clip_config.json").write_text(json.dumps(config, indent=1))
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        save_file(contiguous, temporary / "open_clip_model.safetensors")
    return note


if __name__ == "__main__":
    sys.exit(main())
