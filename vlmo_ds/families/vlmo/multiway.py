"""MultiWayTransformer: one stack of blocks, walked once for any number of streams of sequences.

A stream is a set of sequences of one kind: text alone, image alone, or text followed by image. The tokens of all
streams are packed into one matrix [N, D], ordered so that each expert's tokens are consecutive rows: linear layers,
norms and experts run once on many rows, and only attention looks at single sequences. Below `vlffn_start_layer_index`
text tokens take the text expert and image tokens the image expert, whatever the stream; from there on the joint
streams take the vision-language expert. A one-modality stream with `vl_twin` goes on twice from there: through its
own expert and, as its twin, through the vision-language expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from vlmo_ds.blocks.layers import PatchEmbed, given
from vlmo_ds.blocks.position import joint_position_index
from vlmo_ds.families.vlmo.block import AttentionGroup, Block, PackedLayout


class Stream(NamedTuple):
    """Sequences of one kind. At least one of text_BLD and image_rows_B is given, with the same B.

    A tuple, like Encoded: DeepSpeed looks for tensors in tuples, lists and dicts to hang ZeRO-3's backward hooks on.
    """

    text_BLD: Tensor | None = None  # embedded text
    text_mask_BL: Tensor | None = None  # 1 = token, 0 = padding; needed with text_BLD
    image_rows_B: Tensor | None = None  # which of the images embedded in the same call, int64
    vl_twin: bool = False

    def check(self) -> None:
        if self.text_BLD is None and self.image_rows_B is None:
            raise ValueError("a stream needs text_BLD or image_rows_B")
        if (self.text_BLD is None) != (self.text_mask_BL is None):
            raise ValueError("a stream needs text_BLD and text_mask_BL together")
        if self.joint and self.vl_twin:
            raise ValueError("vl_twin is for streams of one modality; a joint stream is in the VL experts already")

    @property
    def joint(self) -> bool:
        return self.text_BLD is not None and self.image_rows_B is not None

    @property
    def batch(self) -> int:
        return len(self.text_BLD if self.text_BLD is not None else given(self.image_rows_B, "image_rows_B"))


class Encoded(NamedTuple):
    """A stream's tokens after the final norm, [B, L, D]; twin_BLD likewise from the VL experts, where asked for."""

    tokens_BLD: Tensor
    twin_BLD: Tensor | None = None


@dataclass
class Piece:
    """A run of packed rows: the text or the image tokens (or both, joined) of one stream, or its twin."""

    owner: int  # stream
    part: str  # "text", "image", "joint", "twin"
    expert: str
    start: int
    batch: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.batch * self.length)


@lru_cache(maxsize=64)
def joint_index_on(device: torch.device, window: int, text_len: int, max_text_len_of_initckpt: int) -> Tensor:
    return joint_position_index(window, text_len, max_text_len_of_initckpt).to(device)


class MultiWayTransformer(nn.Module):
    """The shared backbone (VLMo, arXiv:2111.02358, section 3), with the official parameter names.

    Everything goes through forward, images too: under ZeRO-3 a module's own parameters exist only inside it.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        vlffn_start_layer_index: int,
        use_abs_pos_emb: bool = False,
        layer_scale_init_values: float | None = 0.1,
        max_text_len_of_initckpt: int = 196,
        drop_path_rate: float = 0.0,
        with_mask_token: bool = False,
        attention: str = "auto",
        checkpoint_every: int = 0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.vlffn_start_layer_index = vlffn_start_layer_index
        self.max_text_len_of_initckpt = max_text_len_of_initckpt
        self.window = image_size // patch_size
        self.checkpoint_every = checkpoint_every
        self.offload_checkpoints = False  # keep the inputs of recomputed blocks in host memory
        self.patch_embed = PatchEmbed(image_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if with_mask_token else None
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim)) if use_abs_pos_emb else None
        )
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                rates[i],
                layer_scale_init_values,
                with_vl_expert=i >= vlffn_start_layer_index,
                attention=attention,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(
        self,
        streams: Sequence[Stream],
        bias_table: Tensor | None,
        image_BCHW: Tensor | None = None,
        image_type: Tensor | None = None,
        mask_BP: Tensor | None = None,
    ) -> list[Encoded]:
        """Embeds the images once, walks the blocks once for all streams, and normalises the result.

        bias_table: [distances, layers x heads], the relative position table; None with absolute positions.
        image_BCHW: normalised images that the streams' image_rows_B point to.
        image_type: token-type embedding of the images, broadcastable to [B, 1, D].
        mask_BP: true where a patch is replaced by the mask token (masked image modelling).
        """
        for stream in streams:
            stream.check()
        images = None
        if image_BCHW is not None:
            images = self.visual_embed(image_BCHW, mask_BP) + given(image_type, "image_type")
        image_len = self.patch_embed.num_patches + 1
        lower = place(streams, lower_order(streams), image_len)
        upper = place(streams, upper_order(streams), image_len)
        device = self.norm.weight.device
        relative = bias_table is not None

        def embedded(piece: Piece) -> Tensor:
            stream = streams[piece.owner]
            if piece.part == "text":
                return given(stream.text_BLD, "text_BLD")
            return given(images, "image_BCHW").index_select(0, given(stream.image_rows_B, "image_rows_B"))

        x_ND = torch.cat([embedded(p).flatten(0, 1) for p in lower])
        layout = self.layout(streams, lower, device, relative)
        tables = [None] * len(self.blocks) if bias_table is None else bias_table.split(self.num_heads, dim=1)
        for i, block in enumerate(self.blocks):
            if i == self.vlffn_start_layer_index:
                x_ND = repack(x_ND, lower, upper)
                layout = self.layout(streams, upper, device, relative)
            if self.checkpoint_every and self.training and i % self.checkpoint_every == 0:
                with save_on_cpu(pin_memory=x_ND.is_cuda) if self.offload_checkpoints else nullcontext():
                    x_ND = checkpoint(block, x_ND, layout, tables[i], use_reentrant=False)
            else:
                x_ND = block(x_ND, layout, tables[i])
        if self.vlffn_start_layer_index >= len(self.blocks):
            x_ND = repack(x_ND, lower, upper)
        x_ND = self.norm(x_ND)
        tokens = {(p.owner, p.part == "twin"): x_ND[p.rows].view(p.batch, p.length, -1) for p in upper}
        return [Encoded(tokens[i, False], tokens.get((i, True))) for i in range(len(streams))]

    def visual_embed(self, image_BCHW: Tensor, mask_BP: Tensor | None) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + P, D]: class token, then patches."""
        x_BLD = self.patch_embed(image_BCHW)
        if mask_BP is not None:
            x_BLD = torch.where(mask_BP[:, :, None], given(self.mask_token, "the mask token"), x_BLD)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BLD), -1, -1), x_BLD), dim=1)
        return x_BLD if self.pos_embed is None else x_BLD + self.pos_embed

    def layout(
        self, streams: Sequence[Stream], pieces: list[Piece], device: torch.device, relative: bool
    ) -> PackedLayout:
        experts: dict[str, slice] = {}
        by_sequences: dict[tuple[int, bool], list[Piece]] = {}
        for piece in pieces:
            first = experts[piece.expert].start if piece.expert in experts else piece.start
            experts[piece.expert] = slice(first, piece.rows.stop)
            by_sequences.setdefault((piece.owner, piece.part == "twin"), []).append(piece)
        groups, sequence, first = [], {}, 0
        for (owner, _), parts in by_sequences.items():
            stream = streams[owner]
            length = sum(p.length for p in parts)
            key_mask_BL = stream.text_mask_BL
            if stream.joint:
                text_mask_BL = given(key_mask_BL, "text_mask_BL")
                key_mask_BL = nn.functional.pad(text_mask_BL, (0, length - text_mask_BL.shape[1]), value=1)
            groups.append(
                AttentionGroup(
                    parts=[(p.start, p.batch, p.length) for p in parts],
                    key_mask_BL=key_mask_BL,
                    bias_index_LL=self.bias_index(stream, device) if relative else None,
                )
            )
            ids = torch.arange(first, first + stream.batch, device=device)
            for piece in parts:
                sequence[piece.start] = ids.repeat_interleave(piece.length)
            first += stream.batch
        return PackedLayout(experts, groups, torch.cat([sequence[start] for start in sorted(sequence)]), first)

    def bias_index(self, stream: Stream, device: torch.device) -> Tensor:
        """The stream's square of the joint index, whose diagonal blocks serve text alone and image alone."""
        text_len = 1 if stream.text_BLD is None else stream.text_BLD.shape[1]
        index = joint_index_on(device, self.window, text_len, self.max_text_len_of_initckpt)
        if stream.image_rows_B is None:
            return index[:text_len, :text_len]
        return index if stream.joint else index[text_len:, text_len:]


def lower_order(streams: Sequence[Stream]) -> list[tuple[int, str, str]]:
    """(stream, part, expert) below the VL experts: all text tokens, then all image tokens."""
    order = [(i, "text", "text") for i, s in enumerate(streams) if s.text_BLD is not None]
    return order + [(i, "image", "imag") for i, s in enumerate(streams) if s.image_rows_B is not None]


def upper_order(streams: Sequence[Stream]) -> list[tuple[int, str, str]]:
    """The same in the layers with VL experts: text alone, image alone, then everything that takes the VL expert."""
    single = [(i, s) for i, s in enumerate(streams) if not s.joint]
    order = [(i, "text", "text") for i, s in single if s.text_BLD is not None]
    order += [(i, "image", "imag") for i, s in single if s.image_rows_B is not None]
    order += [(i, "joint", "vl") for i, s in enumerate(streams) if s.joint]
    return order + [(i, "twin", "vl") for i, s in single if s.vl_twin]


def place(streams: Sequence[Stream], order: list[tuple[int, str, str]], image_len: int) -> list[Piece]:
    """Gives each (stream, part, expert) its rows, in the order given."""
    pieces, start = [], 0
    for owner, part, expert in order:
        stream = streams[owner]
        length = stream.text_BLD.shape[1] if stream.text_BLD is not None and part != "image" else 0
        if stream.image_rows_B is not None and part != "text":
            length += image_len
        pieces.append(Piece(owner, part, expert, start, stream.batch, length))
        start += stream.batch * length
    return pieces


def repack(x_ND: Tensor, lower: list[Piece], upper: list[Piece]) -> Tensor:
    """Reorders the packed tokens from the lower to the upper order, and copies what goes on as a twin."""
    rows = {(p.owner, p.part): x_ND[p.rows].view(p.batch, p.length, -1) for p in lower}

    def tokens(piece: Piece) -> Tensor:
        if piece.part == "joint":
            return torch.cat((rows[piece.owner, "text"], rows[piece.owner, "image"]), dim=1)
        if piece.part == "twin":
            return rows[piece.owner, "text" if (piece.owner, "text") in rows else "image"]
        return rows[piece.owner, piece.part]

    return torch.cat([tokens(p).flatten(0, 1) for p in upper])
