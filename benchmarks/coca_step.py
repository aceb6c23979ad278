"""Seconds and memory of CoCa's contrastive and captioning step, beside a plain version that computes padding and all logits.

    python benchmarks/coca_step.py [--arch coca_ViT-B-32] [--batch 8] [--dtype float32] [--golden FILE] [--output FILE]

The plain version is written as the model is usually written: texts padded to the context with a mask for each, the vocabulary
head on every place, one large cross-entropy. It has the same weights, and both give the same losses and gradients (in float64
on a small model, before anything is timed; with --golden it is held against recorded numbers as well). Forward and backward in
one process for each version; memory is the peak of the process beyond weights and gradients. Lengths of captions are those of
COCO (13.8 tokens on average), and full ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import PARITY, Step, compare_with_plain, computed_by, difference, lengths_of, of_model, pairs_of
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

TASKS = {"itc": 1.0, "caption": 2.0}
COCO_LENGTHS = (11, 12, 12, 13, 14, 14, 16, 18)  # eighths of 1,676 captions in CLIP's tokens, start and end included


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
        computed_by(self, Block, PlainBlock)

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
        batch = pairs_of(config, [5, 9, 20, 12], config.vocab_size, torch.device("cpu"))
        worst = max(worst, difference(Plain(config, TASKS).double(), CoCa(config, TASKS), batch))
    if golden:
        recorded = torch.load(golden, weights_only=True)
        ids = recorded["batch"]["text"]
        batch = {"image": recorded["batch"]["image"].double(), "text_ids": ids, "text_masks": (ids != 0).long()}
        config = CoCaSettings(**from_open_clip(recorded["config"]))
        plain = Plain(config, TASKS).double()
        plain.load_state_dict({name: value.double() for name, value in recorded["state_dict"].items()})
        worst = max(
            worst,
            relative_difference(plain(batch).loss, recorded["total"]),
            difference(plain, CoCa(config, TASKS), batch),
        )
    if worst > PARITY:
        sys.exit(f"error: the plain version differs by {worst:.1e}")
    return worst


def step_of(settings: dict, version: str, dtype: torch.dtype, captions: str, device: torch.device) -> Step:
    pairs = settings["batch"]
    config = CoCaSettings(**of_model(settings), vocab_size=49408)
    model = (Plain if version == "plain" else CoCa)(config, TASKS).to(device=device, dtype=dtype).train()
    lengths = lengths_of(pairs, config.max_text_len, captions, COCO_LENGTHS)
    stage = FAMILY.stage(name="a", tasks=TASKS, data=DataConfig(shards=["-"]), global_batch_size=pairs, steps=1)
    forward = forward_flops(config.model_copy(update={"max_text_len": round(sum(lengths) / pairs)}), stage)
    batch, short = (pairs_of(config, of, config.vocab_size, device) for of in (lengths, [5]))
    return Step(model, batch, short, 3 * forward, {"gflop_forward_a_pair": round(forward / 1e9, 1)})


if __name__ == "__main__":
    compare_with_plain(__doc__, __file__, {"arch": "coca_ViT-B-32", "batch": 8}, check_parity, step_of)
