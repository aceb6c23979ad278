"""Seconds and memory of CoCa's contrastive and captioning step, beside a plain version that computes padding and all logits.

    python benchmarks/coca_step.py [--arch coca_ViT-B-32] [--batch 8] [--dtype float32] [--golden FILE] [--output FILE]

The plain version is written as the model is usually written: texts padded to the context with a mask for each, the vocabulary
head on every place, one large cross-entropy. It has the same weights, and both give the same losses and gradients (in float64
on a small model, before anything is timed; with --golden it is held against recorded numbers as well). Forward and backward in
one process for each version; memory is the peak of the process beyond weights and gradients. Lengths of captions are those of
COCO (13.8 tokens on average), and full ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import matrix_rate, measured, memory, versions_beside, write_results
from torch import Tensor

from vlmo_ds.blocks.fold import Fold, joined
from vlmo_ds.blocks.layers import unit
from vlmo_ds.config import DataConfig
from vlmo_ds.families.coca import FAMILY
from vlmo_ds.families.coca.block import Block
from vlmo_ds.families.coca.config import CoCaSettings
from vlmo_ds.families.coca.cost import forward_flops
from vlmo_ds.families.coca.model import CoCa
from vlmo_ds.families.coca.weights import from_open_clip
from vlmo_ds.families.comparing import relative_difference
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.training.host import prepare_cpu

TASKS = {"itc": 1.0, "caption": 2.0}
COCO_LENGTHS = (11, 12, 12, 13, 14, 14, 16, 18)  # eighths of 1,676 captions in CLIP's tokens, start and end included
PARITY = 1e-9  # relative, float64


class PlainBlock(Block):
    """The same block as PyTorch's layers compute it: every activation is kept."""

    def forward(
        self, x: Tensor, context_BSD: Tensor | None = None, mask: Tensor | None = None, fold: Fold | None = None
    ) -> Tensor:
        normed = self.ln_1(x)
        if context_BSD is None:
            q, k, v = self.attn.of_itself(normed)
        else:
            q, (k, v) = self.attn.query(normed), self.attn.keys_and_values(self.ln_1_kv(context_BSD))
        x = x + self.attn.out_proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        second = self.mlp.c_proj
        return x + F.linear(F.gelu(self.mlp.c_fc(self.ln_2(x))), second.weight, second.bias)


class Plain(CoCa):
    """The same model computed plainly."""

    def __init__(self, config: CoCaSettings, tasks: dict[str, float]):
        super().__init__(config, tasks)
        for module in self.modules():
            if isinstance(module, Block):
                module.__class__ = PlainBlock

    def step(self, batch: Batch) -> StepOutput:
        out = StepOutput.empty()
        lengths_B = batch["text_masks"].sum(1)
        length = self.config.max_text_len
        ids_BL = F.pad(batch["text_ids"], (0, length - batch["text_ids"].shape[1]))
        image, tokens_BSD = self.visual(self.pixels(batch))
        text, decoder = self.text, self.text_decoder
        x_BLD = torch.cat((text.token_embedding(ids_BL), text.cls_emb.expand(len(ids_BL), 1, -1)), 1)
        x_BLD = text.transformer(x_BLD + text.positional_embedding, self.mask(lengths_B)[:, None])
        feature = text.ln_final(x_BLD[:, -1]) @ text.text_projection
        found = {"image": unit(image), "text": unit(feature), "logit_scale": self.logit_scale}
        self.add_contrast(out, found)
        y_BLD = x_BLD[:, : length - 1]
        place = torch.arange(length - 1, device=ids_BL.device)
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            y_BLD = cross(block(y_BLD, None, place[:, None] >= place[None]), tokens_BSD)
        logits = (decoder.ln_final(y_BLD) @ decoder.text_projection).float()
        valid = place[None] < (lengths_B - 1)[:, None]
        labels = torch.where(valid, ids_BL[:, 1:], -100)
        if self.visual.class_embedding.dtype == torch.float64:
            logits = decoder.ln_final(y_BLD) @ decoder.text_projection
        loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        self.record(out, "caption", (loss, {}))
        return out._replace(loss=added(out.losses.values()))

    def mask(self, lengths_B: Tensor) -> Tensor:
        """[B, L + 1, L + 1]: words see those before them; the class token, in the last place, its words (and with the
        released models' mask the place after them)."""
        length = self.config.max_text_len
        place = torch.arange(length + 1, device=lengths_B.device)
        causal = (place[:, None] >= place[None]).expand(len(lengths_B), -1, -1).clone()
        correct = self.config.class_mask == "correct"
        causal[:, -1] = place[None] < (lengths_B + (not correct))[:, None]
        if correct:
            causal[:, -1, -1] = True
        return causal


def batch_of(config: CoCaSettings, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    longest = max(lengths)
    masks = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    batch = {
        "image": torch.randint(0, 256, (len(lengths), 3, config.image_size, config.image_size), generator=g).to(
            torch.uint8
        ),
        "text_ids": torch.randint(1, config.vocab_size, masks.shape, generator=g) * masks,
        "text_masks": masks,
    }
    return {name: value.to(device) for name, value in batch.items()}


def check_parity(golden: Path | None) -> float:
    """The worst relative difference of losses and gradients between the two versions. SystemExit where they differ."""
    torch.manual_seed(0)
    small = {
        "image_size": 64,
        "patch_size": 16,
        "vision_layers": 2,
        "text_layers": 2,
        "decoder_layers": 2,
        "pooler_queries": 9,
    }
    worst = 0.0
    for mask in ("legacy", "correct"):
        config = CoCaSettings(**small, vocab_size=90, max_text_len=20, class_mask=mask)
        batch = batch_of(config, [5, 9, 20, 12], torch.device("cpu"))
        worst = max(worst, difference(config, None, batch))
    if golden:
        recorded = torch.load(golden, weights_only=True)
        ids = recorded["batch"]["text"]
        batch = {"image": recorded["batch"]["image"].double(), "text_ids": ids, "text_masks": (ids != 0).long()}
        config = CoCaSettings(**from_open_clip(recorded["config"]))
        plain = Plain(config, TASKS).double()
        plain.load_state_dict({name: value.double() for name, value in recorded["state_dict"].items()})
        worst = max(worst, relative_difference(plain(batch).loss, recorded["total"]), difference(config, plain, batch))
    if worst > PARITY:
        sys.exit(f"error: the plain version differs by {worst:.1e}")
    return worst


def difference(config: CoCaSettings, plain: Plain | None, batch: dict[str, Tensor]) -> float:
    plain = plain or Plain(config, TASKS).double()
    ours = CoCa(config, TASKS).double()
    ours.load_state_dict(plain.state_dict())
    losses = [model(batch).loss for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    worst = relative_difference(losses[1], losses[0])
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        worst = max(worst, relative_difference(one.grad, other.grad))
    return worst


def one(version: str, arch: str, pairs: int, dtype_name: str, full: bool, repeats: int) -> dict:
    """One setting, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        prepare_cpu()
    dtype = getattr(torch, dtype_name)
    config = CoCaSettings(arch=arch, vocab_size=49408)
    model = (Plain if version == "plain" else CoCa)(config, TASKS).to(device=device, dtype=dtype).train()
    lengths = [config.max_text_len if full else COCO_LENGTHS[i % len(COCO_LENGTHS)] for i in range(pairs)]
    batch = batch_of(config, lengths, device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():  # threads and kernels are there before memory is counted
        model(batch_of(config, [5], device))
    before = memory(reset=True)
    model(batch).loss.backward()
    peak = memory() - before

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(batch).loss.backward()

    seconds = measured(step, repeats, 1 if device.type == "cpu" else 5)
    stage = FAMILY.stage(name="a", tasks=TASKS, data=DataConfig(shards=["-"]), global_batch_size=pairs, steps=1)
    shortened = config.model_copy(update={"max_text_len": round(sum(lengths) / pairs)})
    forward = forward_flops(shortened, stage)
    return {
        "version": version,
        "arch": arch,
        "batch": pairs,
        "dtype": dtype_name,
        "captions": "full" if full else "COCO's lengths",
        "seconds": round(seconds, 3),
        "pairs_per_second": round(pairs / seconds, 2),
        "peak_beyond_weights_and_gradients_gb": round(peak / 1e9, 3),
        "gflop_forward_a_pair": round(forward / 1e9, 1),
        "share_of_matrix_product_rate": round(3 * forward * pairs / seconds / matrix_rate(dtype, device), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="coca_ViT-B-32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--golden", type=Path, help="recorded numbers that the plain version has to reach")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--one", nargs=3, metavar=("VERSION", "DTYPE", "LENGTHS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        version, dtype, lengths = args.one
        print(json.dumps(one(version, args.arch, args.batch, dtype, lengths == "full", args.repeats)))
        return
    worst = check_parity(args.golden)
    print(f"the two versions differ by at most {worst:.1e} in losses and gradients (float64)", flush=True)
    results: list[dict] = [{"largest difference of the versions, float64": worst}]
    for dtype, lengths in itertools.product(args.dtype, ("COCO", "full")):
        settings = ["--arch", args.arch, "--batch", str(args.batch), "--repeats", str(args.repeats)]
        results += versions_beside(__file__, settings, [dtype, lengths], ("dtype", "captions"))
    if args.output:
        write_results(args.output, results)


if __name__ == "__main__":
    main()
