"""Images a second of beam search with a cache of keys and values, beside computing every word anew.

    python benchmarks/generation.py [--arch coca_ViT-B-32] [--images 8] [--beams 3] [--words 20] [--output FILE]

Both write texts of exactly so many words for the same images with the same weights, and have to write the same. Computing anew is
transformers' own `generate` on the exported model, which takes the image tower once and both text stacks at every word.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from common import measured, write_results
from transformers import GenerationConfig

from vlmo_ds.config import DecodingConfig
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.huggingface import CoCaConfig, CoCaForConditionalGeneration
from vlmo_ds.generation.decoding import written

START, END = 49406, 49407


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="coca_ViT-B-32")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--words", type=int, default=20, help="of a text, the start included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = CoCaSettings(arch=args.arch, vocab_size=49408)
    exported = CoCaForConditionalGeneration(CoCaConfig(**settings.model_dump())).to(device).eval()
    exported.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=END, pad_token_id=END)
    model = exported.coca
    size = settings.image_size
    batch = {"image": torch.randn(args.images, 3, size, size), "image_id": torch.arange(args.images)}
    batch = {name: value.to(device) for name, value in batch.items()}
    lengths = {"min_length": args.words, "max_length": args.words}
    config = DecodingConfig(method="beam", beams=args.beams, **lengths)

    @torch.no_grad()
    def cached() -> list[list[int]]:
        return [texts[0] for texts in written(model, batch, [START], END, config)]

    def anew() -> list[list[int]]:
        return exported.generate(batch["image"], num_beams=args.beams, do_sample=False, **lengths).tolist()

    same = [ours == theirs[: len(ours)] for ours, theirs in zip(cached(), anew(), strict=True)]
    if not all(same):
        sys.exit(f"error: {len(same) - sum(same)} of {len(same)} texts differ")
    seconds = {name: measured(function, args.repeats, 1) for name, function in (("cached", cached), ("anew", anew))}
    result = {
        "arch": args.arch,
        "images": args.images,
        "beams": args.beams,
        "words": args.words,
        "equal texts": len(same),
        **{f"images a second, {name}": round(args.images / value, 2) for name, value in seconds.items()},
        "times as fast": round(seconds["anew"] / seconds["cached"], 2),
    }
    print(json.dumps(result))
    if args.output:
        write_results(args.output, [result])


if __name__ == "__main__":
    main()
