"""Seconds and memory of a step of BEiT-3's masked data modelling, beside a plain version: a pass for images, one for texts, one for pairs.

    python benchmarks/beit3_step.py [--arch beit3_base_patch16] [--batch 4] [--recompute cheap] [--dtype float32] [--golden FILE] [--output FILE]

A step has so many images, texts and pairs, the latter seen twice (masked words, masked patches). The plain version is written as the model is
usually written: texts padded to the longest they may be, each pass through both experts one after the other, everything computed behind
the last block, every activation kept, all logits of the masked positions. It has the same weights, and both give the same losses and
gradients (in float64 on a small model, before anything is timed; with --golden it is held against recorded encodings as well).
Forward and backward, in one process for each version; memory is the peak beyond weights and gradients. Lengths of captions are those of COCO
(14.0 word pieces on average), and full ones; 15% of the words of texts are masked and half of those of pairs, 40% of the patches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import PARITY, Step, compare_with_plain, computed_by, difference, lengths_of, of_model, pairs_of
from torch import Tensor

from vlmo_ds.blocks.heads import TargetLinear
from vlmo_ds.config import DataConfig, StreamConfig
from vlmo_ds.families.beit3 import FAMILY
from vlmo_ds.families.beit3.block import FeedForwardNetwork
from vlmo_ds.families.beit3.config import UNUSED_POSITIONS, BEiT3Settings
from vlmo_ds.families.beit3.cost import forward_flops
from vlmo_ds.families.beit3.model import BEiT3
from vlmo_ds.families.beit3.parity import build
from vlmo_ds.families.comparing import relative_difference
from vlmo_ds.families.step import Batch, StepOutput, added

TASKS = {"mim": 1.0, "textmlm": 1.0, "mvlm": 1.0}
IGNORE = -100


class PlainFeedForward(FeedForwardNetwork):
    """With every activation kept."""

    def forward(self, x: Tensor, cheap: bool = False) -> Tensor:
        hidden = self.ffn_layernorm(F.gelu(self.fc1(x)))
        return F.linear(hidden, self.fc2.weight, self.fc2.bias)


class Plain(BEiT3):
    """The same model computed plainly."""

    def __init__(self, config: BEiT3Settings, tasks: dict[str, float]):
        super().__init__(config, tasks)
        computed_by(self, FeedForwardNetwork, PlainFeedForward)

    def step(self, batch: Batch) -> StepOutput:
        out = StepOutput.empty()
        mask_BP = batch["images/image_mask"]
        image = self.walk(self.pixels(batch["images/image"]), mask_BP)[:, 1:]
        loss = self.loss(self.mim_head, image[mask_BP], batch["images/visual_tokens"][mask_BP])
        self.record(out, "mim", (loss, {}))
        labels = batch["texts/text_labels_mlm"]
        ids, keys = self.padded(batch["texts/text_ids_mlm"], batch["texts/text_masks"])
        text = self.walk(ids=ids, keys=keys)[:, : labels.shape[1]]
        self.record(out, "textmlm", (self.loss(self.mlm_head, text[labels != IGNORE], labels[labels != IGNORE]), {}))
        mask_BP, labels = batch["image_mask"], batch["text_labels_mlm"]
        whole = torch.zeros_like(mask_BP)
        ids, keys = self.padded(torch.cat((batch["text_ids_mlm"], batch["text_ids"])), batch["text_masks"].repeat(2, 1))
        pixels = self.pixels(batch["image"]).repeat(2, 1, 1, 1)
        words, patches = self.walk(pixels, torch.cat((whole, mask_BP)), ids, keys).chunk(2)
        images = mask_BP.shape[1] + 1
        text = words[:, images : images + labels.shape[1]]
        loss = self.loss(self.mlm_head, text[labels != IGNORE], labels[labels != IGNORE])
        loss = loss + self.loss(self.mim_head, patches[:, 1:images][mask_BP], batch["visual_tokens"][mask_BP])
        self.record(out, "mvlm", (loss, {}))
        return out._replace(loss=added(out.losses.values()))

    def padded(self, ids: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        more = self.config.max_text_len - ids.shape[1]
        return F.pad(ids, (0, more)), F.pad(masks, (0, more)).bool()

    def loss(self, head: TargetLinear, x_MD: Tensor, labels_M: Tensor) -> Tensor:
        logits = F.linear(x_MD, head.weight, head.bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels_M)

    def walk(
        self,
        image: Tensor | None = None,
        mask_BP: Tensor | None = None,
        ids: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """[B, I + L, D] of images, of texts, or of both."""
        beit3, encoder, parts, images = self.beit3, self.beit3.encoder, [], 0
        allowed = None
        if image is not None:
            embed = beit3.vision_embed
            x = embed.proj(image).flatten(2).transpose(1, 2)
            if mask_BP is not None:
                x = torch.where(mask_BP[:, :, None], embed.mask_token, x)
            x = torch.cat((embed.cls_token.expand(len(x), -1, -1), x), dim=1)
            parts.append(x + encoder.embed_positions["A"].weight[UNUSED_POSITIONS:])
            images = x.shape[1]
        if ids is not None and keys is not None:
            places = encoder.embed_positions["B"].weight[UNUSED_POSITIONS : UNUSED_POSITIONS + ids.shape[1]]
            parts.append((beit3.text_embed(ids) + places) * keys[:, :, None])
            allowed = F.pad(keys, (images, 0), value=True)[:, None, None]
        x = torch.cat(parts, dim=1)

        def by_expert(layer: torch.nn.Module, x: Tensor) -> Tensor:
            found = [layer[name](of) for name, of in (("A", x[:, :images]), ("B", x[:, images:])) if of.shape[1]]
            return torch.cat(found, dim=1)

        for block in encoder.layers:
            attn, normed = block.self_attn, by_expert(block.self_attn_layer_norm, x)
            q, k, v = (
                by_expert(layer, normed).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
                for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
            x = x + by_expert(attn.out_proj, by_expert(attn.inner_attn_ln, mixed))
            x = x + by_expert(block.ffn, by_expert(block.final_layer_norm, x))
        return by_expert(encoder.layer_norm, x)


def batch_of(config: BEiT3Settings, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    found = {}
    for stream, share in (("", 0.5), ("images/", 0.0), ("texts/", 0.15)):
        g = torch.Generator().manual_seed(len(stream))
        part = pairs_of(config, lengths, config.vocab_size - 10, device)
        if stream != "texts/":
            masked = torch.zeros(len(lengths), config.patches, dtype=torch.bool)
            masked[:, torch.randperm(config.patches, generator=g)[: round(0.4 * config.patches)]] = True
            tokens = torch.randint(config.num_visual_tokens, masked.shape, generator=g)
            found |= {f"{stream}image": part["image"]}
            found |= {f"{stream}image_mask": masked.to(device), f"{stream}visual_tokens": tokens.to(device)}
        if stream != "images/":
            ids, masks = part["text_ids"].cpu(), part["text_masks"].cpu().bool()
            chosen = (torch.rand(ids.shape, generator=g) < share) & masks
            chosen[:, 1] = True
            words = {
                "text_ids": ids,
                "text_ids_mlm": ids.masked_fill(chosen, config.vocab_size - 1),
                "text_labels_mlm": ids.masked_fill(~chosen, IGNORE),
                "text_masks": masks.long(),
            }
            found |= {f"{stream}{name}": value.to(device) for name, value in words.items()}
    return found


def check_parity(golden: Path | None) -> float:
    """The worst relative difference of losses and gradients between the two versions. SystemExit where they differ."""
    config = BEiT3Settings(image_size=64, depth=3, vocab_size=90, max_text_len=20, num_visual_tokens=30)
    device = torch.device("cpu")
    plain = Plain(config, TASKS).double()
    worst = difference(
        plain, BEiT3(config, TASKS), batch_of(config, [5, 9, 20, 12], device), ("k_proj.A.bias", "k_proj.B.bias")
    )
    if golden:
        recorded = torch.load(golden, weights_only=True)
        ours = build(recorded, "captioning", torch.float64)
        plain = Plain(ours.config.model_copy(update={"num_visual_tokens": 1}), TASKS).double().eval()
        plain.beit3.load_state_dict(ours.beit3.state_dict())
        with torch.no_grad():
            image = plain.walk(recorded["batch"]["image"].double(), recorded["batch"]["image_mask"])
        worst = max(worst, relative_difference(image, recorded["outputs"]["image_masked"]))
    if worst > PARITY:
        sys.exit(f"error: the plain version differs by {worst:.1e}")
    return worst


def step_of(settings: dict, version: str, dtype: torch.dtype, captions: str, device: torch.device) -> Step:
    pairs = settings["batch"]
    config = BEiT3Settings(**{**of_model(settings), "max_text_len": 64})
    model = (Plain if version == "plain" else BEiT3)(config, TASKS).to(device, dtype).train()
    lengths = lengths_of(pairs, config.max_text_len, captions)
    data = DataConfig(shards=["-"], mlm_probability=0.5)
    texts = DataConfig(shards=["-"], mlm_probability=0.15)
    streams = {
        "images": StreamConfig(data=data, global_batch_size=pairs),
        "texts": StreamConfig(data=texts, global_batch_size=pairs),
    }
    model_of = config.model_copy(update={"visual_tokenizer": "-", "max_text_len": round(sum(lengths) / pairs)})
    stage = FAMILY.stage(name="a", tasks=TASKS, data=data, streams=streams, global_batch_size=pairs, steps=1)
    of_pair = 3 * forward_flops(model_of, stage)
    batch, short = batch_of(config, lengths, device), batch_of(config, [5, 6], device)
    return Step(model, batch, short, of_pair, {"gflop_a_pair, backward included": round(of_pair / 1e9, 1)})


if __name__ == "__main__":
    compare_with_plain(
        __doc__, __file__, {"arch": "beit3_base_patch16", "batch": 4, "recompute": "cheap"}, check_parity, step_of
    )
