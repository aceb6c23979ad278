"""Seconds and memory of BLIP's step with all three objectives, beside a plain version that walks the text stack for each.

    python benchmarks/blip_step.py [--arch blip_ViT-B-16] [--batch 4] [--queue 57600] [--dtype float32] [--golden FILE] [--output FILE]

The plain version is written as the model is usually written: texts padded to the longest they may be, one walk for contrast,
one for matched pairs, one for wrong ones, one for decoding, each of which computes the images' keys and values anew, all
logits of the vocabulary, every activation kept. It has the same weights, and both give the same losses and gradients (in float64
on a small model, before anything is timed; with --golden it is held against recorded numbers as well). Forward and backward
with the teacher's forward, in one process for each version; memory is the peak beyond weights, teacher and gradients. Lengths of
captions are those of COCO (14.0 word pieces on average), and full ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import PARITY, Step, compare_with_plain, computed_by, difference, lengths_of, of_model, pairs_of
from torch import Tensor

from vlmo_ds.blocks.fold import joined
from vlmo_ds.blocks.layers import unit
from vlmo_ds.blocks.vit import Block
from vlmo_ds.config import DataConfig
from vlmo_ds.families.blip import FAMILY
from vlmo_ds.families.blip.base import begun_with
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.families.blip.cost import forward_flops
from vlmo_ds.families.blip.model import BLIP
from vlmo_ds.families.blip.parity import LOSSES, build
from vlmo_ds.families.blip.text import TextEncoder
from vlmo_ds.families.comparing import relative_difference
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.objectives.itm import Negatives, itm_loss

TASKS = {"itc": 1.0, "itm": 1.0, "lm": 1.0}


class PlainBlock(Block):
    """The image tower's block with every activation kept."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        hidden = F.gelu(self.mlp.fc1(self.norm2(x_BLD)))
        return x_BLD + F.linear(hidden, self.mlp.fc2.weight, self.mlp.fc2.bias)


class Plain(BLIP):
    """The same model computed plainly."""

    def __init__(self, config: BLIPSettings, tasks: dict[str, float]):
        super().__init__(config, tasks)
        computed_by(self, Block, PlainBlock)

    def step(self, batch: Batch) -> StepOutput:
        out = StepOutput.empty()
        length = self.config.max_text_len
        ids, masks = (F.pad(batch[name], (0, length - batch[name].shape[1])) for name in ("text_ids", "text_masks"))
        image_BSD = self.visual_encoder(self.pixels(batch["image"]))
        with torch.no_grad():
            keys = {
                "image": unit(self.vision_proj_m(self.visual_encoder_m(self.pixels(batch["image"]))[:, 0])),
                "text": unit(self.text_proj_m(self.walk(self.text_encoder_m, ids, masks)[:, 0])),
                "image_id": batch["image_id"],
                "sample_id": batch["sample_id"],
            }
        batch = {**batch, **self.keys_of_step([keys])}
        image = unit(self.vision_proj(image_BSD[:, 0]))
        text = unit(self.text_proj(self.walk(self.text_encoder, ids, masks)[:, 0]))
        self.add_contrast_with_keys(out, batch, image, text)
        if "negative_image_index" in batch:
            wrong = Negatives(batch["negative_image_index"], batch["negative_text_index"])
        else:
            wrong = self.drawn(batch, image.detach(), text.detach())
        encoded = begun_with(self.config.encode_word, ids)
        matched = self.walk(self.text_encoder, encoded, masks, image_BSD)[:, 0]
        both = self.walk(
            self.text_encoder,
            torch.cat((encoded, encoded[wrong.text_B])),
            torch.cat((masks, masks[wrong.text_B])),
            torch.cat((image_BSD[wrong.image_B], image_BSD)),
        )[:, 0]
        self.record(out, "itm", itm_loss(self.itm_head(torch.cat((matched, both))), self.collector))
        decoded = begun_with(self.config.decode_word, ids)
        hidden = self.walk(self.text_encoder, decoded, masks, image_BSD, decodes=True)
        head = self.text_decoder.predictions
        logits = F.linear(head.transform(hidden), self.text_encoder.embeddings.word_embeddings.weight, head.bias)
        labels = ids.masked_fill(masks == 0, -100)[:, 1:]
        logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        loss = F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=self.config.label_smoothing)
        self.record(out, "lm", (loss, {}))
        return out._replace(loss=added(out.losses.values()))

    def walk(
        self, encoder: TextEncoder, ids: Tensor, masks: Tensor, image_BSD: Tensor | None = None, decodes: bool = False
    ) -> Tensor:
        """[B, L, D] of padded texts."""
        place = torch.arange(ids.shape[1], device=ids.device)
        mask = masks.bool()[:, None, None]
        if decodes:
            mask = mask & (place[:, None] >= place[None])
        x = encoder.embeddings(ids, place.expand_as(ids))
        for i, layer in enumerate(encoder.layers):
            attention = self.text_decoder.attention[i] if decodes else layer.attention
            x = attended(attention, x, x, mask)
            if image_BSD is not None:
                x = attended(layer.crossattention, x, image_BSD, None)
            second = layer.output.dense
            x = layer.output.LayerNorm(F.linear(F.gelu(layer.intermediate(x)), second.weight, second.bias) + x)
        return x


def attended(module: torch.nn.Module, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    of = module.self
    q, k, v = of.heads(of.query(x)), of.heads(of.key(context)), of.heads(of.value(context))
    return module.output(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), x)


def batch_of(config: BLIPSettings, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    rows = torch.arange(len(lengths), device=device)
    pairs = pairs_of(config, lengths, config.vocab_size - 2, device)
    return {**pairs, "image_id": rows, "sample_id": rows, "negative_seed": torch.tensor(0)}


def check_parity(golden: Path | None) -> float:
    """The worst relative difference of losses and gradients between the two versions. SystemExit where they differ."""
    config = BLIPSettings(image_size=64, vision_layers=2, text_layers=2, vocab_size=90, max_text_len=20, queue_size=30)
    plain = Plain(config, TASKS).double()
    worst = difference(plain, BLIP(config, TASKS), batch_of(config, [5, 9, 20, 12], torch.device("cpu")), "key.bias")
    if golden:
        recorded = torch.load(golden, weights_only=True)
        ours = build(recorded, torch.float64)
        plain = Plain(ours.config, TASKS).double()
        plain.load_state_dict(ours.state_dict())
        plain.follow()
        rows = torch.arange(len(recorded["batch"]["text_ids"]))
        batch = {**recorded["batch"], "image": recorded["batch"]["image"].double(), "image_id": rows, "sample_id": rows}
        batch |= {name: recorded[name] for name in ("negative_image_index", "negative_text_index")}
        losses = plain(batch).losses
        for task, name in LOSSES.items():
            worst = max(worst, relative_difference(losses[task], recorded["losses"][name]))
        worst = max(worst, difference(plain, BLIP(ours.config, TASKS), batch, "key.bias"))
    if worst > PARITY:
        sys.exit(f"error: the plain version differs by {worst:.1e}")
    return worst


def step_of(settings: dict, version: str, dtype: torch.dtype, captions: str, device: torch.device) -> Step:
    pairs = settings["batch"]
    config = BLIPSettings(**of_model(settings), vocab_size=30524, queue_size=settings.get("queue", 57600))
    model = (Plain if version == "plain" else BLIP)(config, TASKS).to(device)
    for parameter in model.parameters():  # the queue stays in float32
        parameter.data = parameter.data.to(dtype)
    model.train()
    lengths = lengths_of(pairs, config.max_text_len, captions)
    stage = FAMILY.stage(name="a", tasks=TASKS, data=DataConfig(shards=["-"]), global_batch_size=pairs, steps=1)
    of_pair = 3 * forward_flops(config.model_copy(update={"max_text_len": round(sum(lengths) / pairs)}), stage)
    batch, short = batch_of(config, lengths, device), batch_of(config, [5, 6], device)
    model.push(model.keys_of_step([model.keys(batch)]))
    return Step(model, batch, short, of_pair, {"gflop_a_pair, backward included": round(of_pair / 1e9, 1)})


if __name__ == "__main__":
    compare_with_plain(__doc__, __file__, {"arch": "blip_ViT-B-16", "batch": 4, "queue": 57600}, check_parity, step_of)
