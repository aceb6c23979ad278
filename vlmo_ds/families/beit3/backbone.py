"""BEiT-3's backbone: one stack of blocks, walked once for any number of streams of sequences.

A stream is a set of sequences of one kind: images, texts, or images followed by texts. The tokens of all streams are packed into one matrix
[N, D], those of images first: each expert works once on consecutive rows, without the padding of texts, and only attention looks
at single sequences. Of the last block only those tokens come out that a stream is read for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.cache import Cache
from vlmo_ds.blocks.fold import Fold, Run
from vlmo_ds.blocks.layers import given
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.families.beit3.block import EXPERTS, Block, Expert, Group, Layout, Multiway, norm
from vlmo_ds.families.beit3.config import UNUSED_POSITIONS, BEiT3Settings

# Tokens that come out: all, the first of each sequence, none, or those of a bool [B, I or L]
Reads = Literal["all", "first", "none"] | Tensor


class Stream(NamedTuple):
    """Sequences of one kind. At least one of image_rows_B and ids_BL is given, with the same B, and read.

    A tuple, like Encoded: DeepSpeed looks for tensors in tuples, lists and dicts to hang ZeRO-3's backward hooks on.
    """

    image_rows_B: Tensor | None = None  # which of the images of the same call, int64
    image_mask_BP: Tensor | None = None  # bool, the patches that are masked; None: none
    ids_BL: Tensor | None = None
    text_mask_BL: Tensor | None = None  # 1 = token, 0 = padding; needed with ids_BL
    causal: bool = False  # images see images alone, and a word what is before it
    read_image: Reads = "all"
    read_text: Reads = "all"

    def reads(self, expert: Expert) -> Reads:
        return self.read_image if expert == "A" else self.read_text


class Encoded(NamedTuple):
    """What a stream is read for, after the final norm: of "all" [B, I or L, D] with zeros at padding, of "first" [B, D], of a mask [M, D]."""

    image: Tensor | None = None
    text: Tensor | None = None


class VisionEmbedding(nn.Module):
    """Patches, some of them masked, behind a class token."""

    def __init__(self, image_size: int, patch_size: int, dim: int):
        super().__init__()
        self.image_size, self.num_patches = image_size, (image_size // patch_size) ** 2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image_BCHW: Tensor, views: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """Images, each cut once, and views of them: (which of them [b], bool [b, P] or None: what is masked) -> [b, 1 + P, D] each."""
        if image_BCHW.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(str(n) for n in image_BCHW.shape[-2:])
            raise ValueError(f"image is {found} pixels, the model takes {self.image_size}x{self.image_size}")
        patches_BPD = self.proj(image_BCHW).flatten(2).transpose(1, 2)
        out = []
        for rows_B, mask_BP in views:
            x_BPD = patches_BPD.index_select(0, rows_B)
            if mask_BP is not None:
                x_BPD = torch.where(mask_BP[:, :, None], self.mask_token, x_BPD)
            out.append(torch.cat((self.cls_token.expand(len(x_BPD), -1, -1), x_BPD), dim=1))
        return out


class Encoder(nn.Module):
    """Positions, blocks and the final norm."""

    def __init__(self, config: BEiT3Settings, recomputed: Recomputed, final_norm: bool):
        super().__init__()
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.recomputed = recomputed
        self.embed_positions = Multiway(
            nn.Embedding(config.patches + 1 + UNUSED_POSITIONS, dim), nn.Embedding(config.max_source_positions, dim)
        )
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.layers = nn.ModuleList(Block(dim, config.num_heads, hidden, rate) for rate in rates)
        self.layer_norm = norm(dim) if final_norm else None

    def positions(self, expert: Expert, places: Tensor) -> Tensor:
        return self.embed_positions[expert](places + UNUSED_POSITIONS)

    def forward(self, x_ND: Tensor, layout: Layout, last: Layout) -> Tensor:
        """[N, D] -> [M, D] of those that go on behind the last block, whose layout is `last`."""
        for i, block in enumerate(self.layers):
            x_ND = self.recomputed(block, i, x_ND, last if i + 1 == len(self.layers) else layout)
        return torch.cat([self.normed(expert, rows) for expert, rows in last.split(x_ND, queries=True)])

    def normed(self, expert: Expert, x: Tensor) -> Tensor:
        return x if self.layer_norm is None else self.layer_norm[expert](x)


class Backbone(nn.Module):
    """The shared stack (BEiT-3, arXiv:2208.10442, section 2.1), with the official parameter names.

    Everything goes through forward: under ZeRO-3 a module's own parameters exist only inside it.
    """

    def __init__(self, config: BEiT3Settings, recomputed: Recomputed, final_norm: bool):
        super().__init__()
        self.text_embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.vision_embed = VisionEmbedding(config.image_size, config.patch_size, config.embed_dim)
        self.encoder = Encoder(config, recomputed, final_norm)

    def forward(
        self,
        streams: Sequence[Stream],
        image_BCHW: Tensor | None = None,
        kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> list[Encoded]:
        """Walks the blocks once for all streams. image_BCHW: normalised images that the streams' image_rows_B point to; kept: gets keys
        and values [B, H, S, D/H] of every layer, of the first stream."""
        folds = [None if s.text_mask_BL is None else Fold.of_mask(s.text_mask_BL) for s in streams]
        layout = self.layout(streams, folds, kept)
        last = read_alone(streams, layout)
        x_ND = torch.cat([*self.images(streams, image_BCHW), *self.texts(streams, folds)])
        x_MD = self.encoder(x_ND, layout, last)
        found: list[dict[Expert, Tensor]] = [{} for _ in streams]
        for expert, rows in last.split(x_MD, queries=True):
            runs = last.runs(expert, queries=True)
            for (i, run), of in zip(runs, rows.split([run.size for _, run in runs]), strict=True):
                found[i][expert] = run.sequences(of) if streams[i].reads(expert) == "all" else of
        return [Encoded(of.get("A"), of.get("B")) for of in found]

    def images(self, streams: Sequence[Stream], image_BCHW: Tensor | None) -> list[Tensor]:
        """Embedded, [B * I, D] of each stream that has any."""
        views = [(s.image_rows_B, s.image_mask_BP) for s in streams if s.image_rows_B is not None]
        if not views:
            return []
        found = self.vision_embed(given(image_BCHW, "image_BCHW"), views)
        position_ID = self.encoder.positions("A", torch.arange(found[0].shape[1], device=found[0].device))
        return [(x_BID + position_ID).flatten(0, 1) for x_BID in found]

    def texts(self, streams: Sequence[Stream], folds: Sequence[Fold | None]) -> list[Tensor]:
        """Embedded words of all streams, [n, D], padding aside; none where there are no texts."""
        ids, places = [], []
        for stream, fold in zip(streams, folds, strict=True):
            if fold is not None:
                ids.append(fold.folded(given(stream.ids_BL, "ids_BL")))
                places.append(fold.places_N % fold.length)
        return [self.words(torch.cat(ids), torch.cat(places))] if ids else []

    def words(self, ids: Tensor, places: Tensor) -> Tensor:
        return self.text_embed(ids) + self.encoder.positions("B", places)

    def layout(
        self, streams: Sequence[Stream], folds: Sequence[Fold | None], kept: list[tuple[Tensor, Tensor]] | None
    ) -> Layout:
        """All tokens, those of images first."""
        device, length = self.vision_embed.cls_token.device, self.vision_embed.num_patches + 1
        tokens: list[dict[Expert, Run]] = [{} for _ in streams]
        start = 0
        for runs, stream in zip(tokens, streams, strict=True):
            if stream.image_rows_B is not None:
                runs["A"] = Run(start, len(stream.image_rows_B), length)
                start += runs["A"].size
        for runs, fold in zip(tokens, folds, strict=True):
            if fold is not None:
                runs["B"] = Run(start, fold.batch, fold.length, fold)
                start += runs["B"].size
        groups = [Group(runs, runs, mask_of(runs, stream.causal)) for runs, stream in zip(tokens, streams, strict=True)]
        firsts = [0]
        for group in groups:
            firsts.append(firsts[-1] + group.batch)
        experts = [expert for expert in EXPERTS if any(expert in runs for runs in tokens)]
        layout = Layout(groups, experts, experts, torch.empty(0), firsts[-1], kept=kept)
        sequences = []
        for expert in experts:
            for i, run in layout.runs(expert):
                ids_B = torch.arange(firsts[i], firsts[i + 1], device=device)
                sequences.append(run.packed(ids_B[:, None, None].expand(-1, run.length, 1))[:, 0])
        return replace(layout, sequence_M=torch.cat(sequences))

    def write(self, ids_RL: Tensor, first: int, memory: Sequence[tuple[Tensor, Tensor]], cache: Cache) -> Tensor:
        """The newest words of R texts and a mask word behind them [R, L] -> the mask word's [R, D] after the final norm. first: words
        before them; memory: what a walk of the images has kept."""
        x_RLD = self.words(ids_RL, first + torch.arange(ids_RL.shape[1], device=ids_RL.device))
        for i, block in enumerate(cast(list[Block], list(self.encoder.layers))):
            x_RLD = block.written(x_RLD, memory[i], cache, i)
        return self.encoder.normed("B", x_RLD[:, -1])

    def reset_parameters(self, std: float) -> None:
        """As torchscale begins them: Xavier's in attention, PyTorch's in feed-forward layers, and fc1, fc2, v and out times
        sqrt(ln(2 * depth)) (Magneto, arXiv:2210.06423, section 2.2); zero biases."""
        scale = math.sqrt(math.log(2 * len(self.encoder.layers)))
        for name, module in self.encoder.layers.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            module.reset_parameters()
            nn.init.zeros_(module.bias)
            if ".self_attn." in name:
                nn.init.xavier_uniform_(module.weight, 1.0 if ".out_proj." in name else 2**-0.5)
            if not any(part in name for part in ("q_proj", "k_proj")):
                with torch.no_grad():
                    module.weight.mul_(scale)
        nn.init.normal_(self.text_embed.weight, std=self.text_embed.embedding_dim**-0.5)
        for table in self.encoder.embed_positions.parameters():
            nn.init.normal_(table, std=std)
        for name, parameter in self.vision_embed.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)


def mask_of(tokens: dict[Expert, Run], causal: bool) -> Tensor | None:
    """Where the tokens of a stream look: at all of their sequence but padding, or (causal) at images and at words before them."""
    text = tokens.get("B")
    if text is None or text.fold is None:
        return None
    images = tokens["A"].length if "A" in tokens else 0
    if not causal:
        return F.pad(text.fold.valid_BL, (images, 0), value=True)[:, None, None]
    place = torch.arange(images + text.length, device=text.fold.valid_BL.device)
    return ((place[None] <= place[:, None]) | (place < images))[None, None]  # padding is behind all words


def read_alone(streams: Sequence[Stream], layout: Layout) -> Layout:
    """The layout of the last block, of which only those tokens go on that the streams are read for."""
    if all(isinstance(r, str) and r == "all" for stream in streams for r in (stream.read_image, stream.read_text)):
        return layout
    queries: list[dict[Expert, Run]] = [{} for _ in streams]
    on, start = [], 0
    places: list[list[Tensor]] = [[] for _ in streams]  # of queries among their sequence's tokens
    for expert in layout.experts:
        for i, run in layout.runs(expert):
            reads = streams[i].reads(expert)
            if isinstance(reads, str) and reads == "none":
                continue
            rows = torch.arange(run.start, run.start + run.size, device=layout.sequence_M.device)
            if isinstance(reads, Tensor):
                rows = run.sequences(rows[:, None])[:, :, 0][reads]
                left = Run(start, run.batch, run.length, Fold.of_mask(reads))
            elif reads == "first":
                rows, left = run.sequences(rows[:, None])[:, 0, 0], Run(start, run.batch, 1)
            else:
                left = run._replace(start=start)
            queries[i][expert] = left
            before = layout.groups[i].tokens["A"].length if expert == "B" and "A" in layout.groups[i].tokens else 0
            places[i].append(torch.arange(before, before + left.length, device=rows.device))
            on.append(rows)
            start += left.size
    on_M = torch.cat(on)
    groups = []
    for group, of, where in zip(layout.groups, queries, places, strict=True):
        mask = group.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, torch.cat(where)]
        groups.append(Group(group.tokens, of, mask))
    experts_on = [expert for expert in layout.experts if any(expert in of for of in queries)]
    return replace(layout, groups=groups, experts_on=experts_on, sequence_M=layout.sequence_M[on_M], on_M=on_M)
