"""Seconds and memory of VLMo's joint step (itc, itm, mlm), beside a plain version that walks the block stack for every stream.

    python benchmarks/baseline.py [--arch vlmo_base_patch16] [--batch 4] [--dtype float32] [--golden FILE] [--output FILE]

The plain version is written as the model is usually written: a walk each for masked pairs, matched pairs, both kinds of wrong pairs,
images and texts, texts padded to the longest they may be, attention written out, logits of the whole vocabulary at every place, the
images of all ranks gathered, every activation kept. It has the same weights, and both give the same losses and gradients (in float64
on a small model, before anything is timed; with --golden it is held against recorded numbers as well). Forward and backward in
one process for each version; memory is the peak beyond weights and gradients. Lengths of captions are those of COCO (14.0 word
pieces on average), and full ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import PARITY, Step, compare_with_plain, computed_by, difference, lengths_of, of_model, pairs_of
from torch import Tensor

from vlmo_ds.blocks.attention import explicit_attention
from vlmo_ds.config import DataConfig
from vlmo_ds.families.comparing import relative_difference
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.families.vlmo import FAMILY
from vlmo_ds.families.vlmo.block import Block
from vlmo_ds.families.vlmo.config import VLMoSettings
from vlmo_ds.families.vlmo.cost import forward_flops
from vlmo_ds.families.vlmo.model import VLMo, normalized
from vlmo_ds.families.vlmo.multiway import Stream
from vlmo_ds.families.vlmo.parity import JOINT, build, step_inputs
from vlmo_ds.objectives.itm import draws_of, itm_loss


class PlainBlock(Block):
    """The same block as it is usually written, for one kind of sequences: every activation is kept."""

    def walk(self, x_BLD: Tensor, bias_HLL: Tensor | None, mask_BL: Tensor | None, split: dict[str, slice]) -> Tensor:
        """split: the tokens of each expert."""
        of, (batch, length, _) = self.attn, x_BLD.shape
        bias = torch.cat((of.q_bias, torch.zeros_like(of.v_bias), of.v_bias))
        qkv = F.linear(self.norm1(x_BLD), of.qkv.weight, bias)
        q, k, v = qkv.view(batch, length, 3, of.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = explicit_attention(q, k, v, bias_HLL, mask_BL).transpose(1, 2).reshape(batch, length, -1)
        x_BLD = x_BLD + self.scaled(F.linear(out, of.proj.weight, of.proj.bias), self.gamma_1)
        parts = []
        for expert, tokens in split.items():
            norm, mlp = getattr(self, f"norm2_{expert}"), getattr(self, f"mlp_{expert}")
            hidden = F.gelu(F.linear(norm(x_BLD[:, tokens]), mlp.fc1.weight, mlp.fc1.bias))
            parts.append(F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))
        return x_BLD + self.scaled(torch.cat(parts, dim=1), self.gamma_2)

    def scaled(self, y_BLD: Tensor, gamma: Tensor | None) -> Tensor:
        return y_BLD if gamma is None else gamma * y_BLD


class Plain(VLMo):
    """The same model computed plainly."""

    def __init__(self, config: VLMoSettings, tasks: dict[str, float]):
        super().__init__(config, tasks)
        computed_by(self, Block, PlainBlock)

    def step(self, batch: Batch) -> StepOutput:
        out = StepOutput.empty()
        length = self.config.max_text_len
        ids, masks, ids_mlm = (
            F.pad(batch[k], (0, length - batch[k].shape[1])) for k in ("text_ids", "text_masks", "text_ids_mlm")
        )
        labels = F.pad(batch["text_labels_mlm"], (0, length - batch["text_labels_mlm"].shape[1]), value=-100)
        images = normalized(batch["image"], self.transformer.cls_token.dtype)
        text, text_vl = self.walk(ids, masks, None)
        image, image_vl = self.walk(None, None, images)
        found = {
            "image": self.itc_image_proj(image[:, 0]),
            "text": self.itc_text_proj(text[:, 0]),
            "vl_image": self.itc_vl_image_proj(image_vl[:, 0]),
            "vl_text": self.itc_vl_text_proj(text_vl[:, 0]),
        }
        draws = draws_of(batch["sample_id"], batch["image_id"], int(batch["negative_seed"]), self.collector)
        wrong = self.negatives(batch, self.add_contrast(out, found | self.logit_terms(), draws))
        tokens, _ = self.walk(ids_mlm, masks, images)
        logits = self.mlm_score(tokens[:, :length])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        self.record(out, "mlm", (F.cross_entropy(logits, labels, ignore_index=-100), {}))
        every_image, every_id, every_mask = (self.collector.gather(t) for t in (images.detach(), ids, masks))
        pairs = [
            self.walk(ids, masks, images)[0],
            self.walk(ids, masks, every_image[wrong.image_B])[0],
            self.walk(every_id[wrong.text_B], every_mask[wrong.text_B], images)[0],
        ]
        cls = torch.cat([of_kind[:, 0] for of_kind in pairs])
        self.record(out, "itm", itm_loss(self.itm_score(self.pooler(cls)), self.collector))
        return out._replace(loss=added(out.losses.values()))

    def walk(
        self, ids_BL: Tensor | None, mask_BL: Tensor | None, images: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Texts, images or pairs -> their tokens [B, L, D], of one modality also those of the VL experts."""
        stack, types = self.transformer, self.token_types()
        parts: dict[str, Tensor] = {}
        if ids_BL is not None:
            parts["text"] = self.text_embeddings(ids_BL) + types[0]
        if images is not None:
            parts["imag"] = stack.visual_embed(images, None) + types[1]
        x, joint = torch.cat(list(parts.values()), dim=1), len(parts) == 2
        if joint and mask_BL is not None:
            mask_BL = F.pad(mask_BL, (0, parts["imag"].shape[1]), value=1)
        split, first = {}, 0
        for expert, part in parts.items():
            split[expert] = slice(first, first + part.shape[1])
            first += part.shape[1]
        biases = self.biases(parts, mask_BL)
        start, twin = stack.vlffn_start_layer_index, None
        for i, block in enumerate(stack.blocks):
            if i == start and not joint:
                twin = x
            if i >= start and joint:
                split = {"vl": slice(None)}
            x = block.walk(x, biases[i], mask_BL, split)
            if twin is not None:
                twin = block.walk(twin, biases[i], mask_BL, {"vl": slice(None)})
        return stack.norm(x), None if twin is None else stack.norm(twin)

    def biases(self, parts: dict[str, Tensor], mask_BL: Tensor | None) -> list[Tensor | None]:
        """[H, L, L] of each layer."""
        stack, table = self.transformer, self.relative_position_bias_table
        if table is None:
            return [None] * len(stack.blocks)
        rows = torch.arange(len(parts["imag"])) if "imag" in parts else None
        index = stack.bias_index(Stream(parts.get("text"), mask_BL, rows), table.device)
        return [of_layer[index].permute(2, 0, 1) for of_layer in table.split(stack.num_heads, dim=1)]


def batch_of(config: VLMoSettings, lengths: list[int], device: torch.device) -> dict[str, Tensor]:
    """Every seventh word is masked."""
    pairs = pairs_of(config, lengths, config.vocab_size, device)
    ids, rows = pairs["text_ids"], torch.arange(len(lengths), device=device)
    place = torch.arange(ids.shape[1], device=device)
    masked = ((place + rows[:, None]) % 7 == 1) & pairs["text_masks"].bool()
    return {
        **pairs,
        "text_ids_mlm": ids.masked_fill(masked, 3),
        "text_labels_mlm": ids.masked_fill(~masked, -100),
        "image_id": rows,
        "sample_id": rows,
        "negative_seed": torch.tensor(0),
    }


def check_parity(golden: Path | None) -> float:
    """The worst relative difference of losses and gradients between the two versions. SystemExit where they differ."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 4, "num_heads": 4, "image_size": 64, "vlffn_start_layer_index": 3}
    config = VLMoSettings(**small, vocab_size=90, max_text_len=20, max_text_len_of_initckpt=20, init_std=0.2)
    plain = Plain(config, JOINT).double()
    with torch.no_grad():
        plain.relative_position_bias_table.normal_()
    worst = difference(plain, VLMo(config, JOINT), batch_of(config, [5, 9, 20, 12], torch.device("cpu")))
    if golden:
        recorded = torch.load(golden, weights_only=True)
        ours = build(recorded, JOINT, torch.float64)
        plain = Plain(ours.config, JOINT).double().eval()
        plain.load_state_dict(ours.state_dict())
        batch = step_inputs(recorded, torch.float64)
        for task, loss in plain(batch).losses.items():
            worst = max(worst, relative_difference(loss, recorded["losses"][task]))
        worst = max(worst, difference(plain, VLMo(ours.config, JOINT), batch))
    if worst > PARITY:
        sys.exit(f"error: the plain version differs by {worst:.1e}")
    return worst


def step_of(settings: dict, version: str, dtype: torch.dtype, captions: str, device: torch.device) -> Step:
    pairs = settings["batch"]
    config = VLMoSettings(**of_model(settings), vocab_size=30522, max_text_len=40)
    model = (Plain if version == "plain" else VLMo)(config, JOINT).to(device=device, dtype=dtype).train()
    lengths = lengths_of(pairs, config.max_text_len, captions)
    data = DataConfig(shards=["-"], mlm_probability=1 / 7)
    stage = FAMILY.stage(name="a", tasks=JOINT, data=data, global_batch_size=pairs, steps=1)
    forward = forward_flops(config.model_copy(update={"max_text_len": round(sum(lengths) / pairs)}), stage)
    batch, short = (batch_of(config, of, device) for of in (lengths, [5, 6]))
    return Step(model, batch, short, 3 * forward, {"gflop_forward_a_pair": round(forward / 1e9, 1)})


if __name__ == "__main__":
    compare_with_plain(__doc__, __file__, {"arch": "vlmo_base_patch16", "batch": 4}, check_parity, step_of)
