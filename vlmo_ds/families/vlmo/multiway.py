"""MultiWayTransformer: one stack of blocks, walked once for any number of streams of sequences.

A stream is a set of sequences of one kind: text alone, image alone, or text followed by image. The tokens of all
streams are packed into one matrix [N, D], ordered so that each expert's tokens are consecutive rows, without the padding
of texts: linear layers, norms and experts run once on many rows, and only attention looks at single sequences. Of the last block
only those tokens come out that a stream is read for. Below `vlffn_start_layer_index`
text tokens take the text expert and image tokens the image expert, whatever the stream; from there on the joint
streams take the vision-language expert. A one-modality stream with `vl_twin` goes on twice from there: through its
own expert and, as its twin, through the vision-language expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.fold import Fold
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import PatchEmbed, given
from vlmo_ds.blocks.position import joint_position_index
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.families.vlmo.block import AttentionGroup, Block, PackedLayout, Run, by_run, in_sequence


class Stream(NamedTuple):
    """Sequences of one kind. At least one of text_BLD and image_rows_B is given, with the same B.

    A tuple, like Encoded: DeepSpeed looks for tensors in tuples, lists and dicts to hang ZeRO-3's backward hooks on.
    """

    text_BLD: Tensor | None = None  # embedded text
    text_mask_BL: Tensor | None = None  # 1 = token, 0 = padding; needed with text_BLD
    image_rows_B: Tensor | None = None  # which of the images embedded in the same call, int64
    vl_twin: bool = False
    reads: Literal["all", "text", "class"] = "all"  # tokens that come out: all, those of the text, the first one
    image_tokens_K: Tensor | None = None  # which tokens of the images, the class token's 0 first, int64; None: all
    seen_BL: Tensor | None = (
        None  # bool, which tokens of each image, of images alone; None: all. The others come out as padding
    )
    early: int = 0  # blocks after which the patches are to come out as well, of images alone and whole; 0: none

    def check(self) -> None:
        if self.text_BLD is None and self.image_rows_B is None:
            raise ValueError("a stream needs text_BLD or image_rows_B")
        if (self.text_BLD is None) != (self.text_mask_BL is None):
            raise ValueError("a stream needs text_BLD and text_mask_BL together")
        if self.reads == "text" and self.text_BLD is None:
            raise ValueError("a stream without text_BLD cannot be read for its text")
        if self.seen_BL is not None and (self.text_BLD is not None or self.image_tokens_K is not None):
            raise ValueError("seen_BL is for images alone, without image_tokens_K")
        if self.early and (self.text_BLD is not None or self.seen_BL is not None or self.reads != "all"):
            raise ValueError("early is for whole images alone, which are read for all tokens")
        if self.joint and self.vl_twin:
            raise ValueError("vl_twin is for streams of one modality; a joint stream is in the VL experts already")

    @property
    def joint(self) -> bool:
        return self.text_BLD is not None and self.image_rows_B is not None

    @property
    def batch(self) -> int:
        return len(self.text_BLD if self.text_BLD is not None else given(self.image_rows_B, "image_rows_B"))


class Encoded(NamedTuple):
    """A stream's tokens after the final norm, those that it is read for, [B, L, D], zeros at padding; twin_BLD likewise from the VL
    experts, where asked for; early_BLD: the class token of the last block and the patches of an early one, before the norm, likewise."""

    tokens_BLD: Tensor
    twin_BLD: Tensor | None = None
    early_BLD: Tensor | None = None


class Kind(NamedTuple):
    """The text or the image tokens of one stream, or of its twin, and the expert that they take."""

    owner: int  # stream
    twin: bool
    image: bool  # else text
    expert: str

    @property
    def sequences(self) -> tuple[int, bool]:
        """Of which these are a part: the stream's, or its twin's."""
        return self.owner, self.twin


class Piece(NamedTuple):
    """Such tokens as a run of packed rows."""

    kind: Kind
    run: Run


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
        recomputed: Recomputed | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.vlffn_start_layer_index = vlffn_start_layer_index
        self.max_text_len_of_initckpt = max_text_len_of_initckpt
        self.window = image_size // patch_size
        self.recomputed = recomputed or Recomputed()
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
        self.recomputed.tell(self)
        self.norm = LayerNorm(embed_dim, eps=1e-6)

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
        folds = folds_of(streams)
        biases = self.biases(streams, bias_table)
        pieces = self.place(streams, folds, lower_order(streams))
        layout = self.layout(streams, pieces, biases)
        x_ND = torch.cat([embedded(streams[piece.kind.owner], piece, images) for piece in pieces])
        early: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            early |= {n: whole(n, pieces, x_ND) for n, stream in enumerate(streams) if i and stream.early == i}
            if i == self.vlffn_start_layer_index:
                lower, pieces = pieces, self.place(streams, folds, upper_order(streams))
                x_ND, layout = repack(x_ND, lower, pieces), self.layout(streams, pieces, biases)
            if i == len(self.blocks) - 1:
                pieces, layout = leave_unread(streams, pieces, layout)
            x_ND = self.recomputed(block, i, x_ND, layout, i)
        for n, patches_BLD in early.items():
            early[n] = torch.cat((whole(n, pieces, x_ND)[:, :1], patches_BLD[:, 1:]), dim=1)
        of_piece = by_run([piece.run for piece in pieces], self.norm(x_ND))
        tokens: dict[tuple[int, bool], list[Tensor]] = {}
        for piece in pieces:
            tokens.setdefault(piece.kind.sequences, []).append(piece.run.sequences(of_piece[piece.run.start]))
        out = {key: in_sequence(parts) for key, parts in tokens.items()}
        # without layers of VL experts a twin is what it is a twin of
        return [
            Encoded(out[i, False], out.get((i, True), out[i, False]) if s.vl_twin else None, early.get(i))
            for i, s in enumerate(streams)
        ]

    def visual_embed(self, image_BCHW: Tensor, mask_BP: Tensor | None) -> Tensor:
        """[B, 3, S, S] -> [B, 1 + P, D]: class token, then patches."""
        x_BLD = self.patch_embed(image_BCHW)
        if mask_BP is not None:
            x_BLD = torch.where(mask_BP[:, :, None], given(self.mask_token, "the mask token"), x_BLD)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BLD), -1, -1), x_BLD), dim=1)
        return x_BLD if self.pos_embed is None else x_BLD + self.pos_embed

    def place(self, streams: Sequence[Stream], folds: Sequence[Fold | None], order: Sequence[Kind]) -> list[Piece]:
        """Gives each kind of tokens its rows, in the order given. folds: as of folds_of."""
        pieces: list[Piece] = []
        start = 0
        for kind in order:
            stream = streams[kind.owner]
            fold = None if kind.image and stream.joint else folds[kind.owner]
            if fold is not None:
                length = fold.length
            elif stream.image_tokens_K is not None:
                length = len(stream.image_tokens_K)
            else:
                length = self.patch_embed.num_patches + 1
            pieces.append(Piece(kind, Run(start, stream.batch, length, fold)))
            start += pieces[-1].run.size
        return pieces

    def biases(self, streams: Sequence[Stream], bias_table: Tensor | None) -> list[Sequence[Tensor | None]]:
        """Of each stream, the position bias of each layer, [H, L, L]: read from the table at once for all layers, and for all streams of
        the same tokens."""
        if bias_table is None:
            return [[None] * len(self.blocks) for _ in streams]
        found: dict[tuple[int, bool, int], Sequence[Tensor | None]] = {}
        keys = [
            (0 if s.text_BLD is None else s.text_BLD.shape[1], s.image_rows_B is None, id(s.image_tokens_K))
            for s in streams
        ]
        for key, stream in zip(keys, streams, strict=True):
            if key not in found:
                every = F.embedding(self.bias_index(stream, bias_table.device), bias_table).permute(2, 0, 1)
                found[key] = every.contiguous().split(self.num_heads)
        return [found[key] for key in keys]

    def layout(
        self, streams: Sequence[Stream], pieces: Sequence[Piece], biases: Sequence[Sequence[Tensor | None]]
    ) -> PackedLayout:
        device = self.norm.weight.device
        by_sequences: dict[tuple[int, bool], list[Piece]] = {}
        for piece in pieces:
            by_sequences.setdefault(piece.kind.sequences, []).append(piece)
        groups, sequence, first = [], {}, 0
        for (owner, _), parts in by_sequences.items():
            stream = streams[owner]
            runs = [piece.run for piece in parts]
            fold = runs[0].fold  # text comes first
            groups.append(AttentionGroup(runs, runs, None if fold is None else fold.valid_BL, biases[owner]))
            ids_B1 = torch.arange(first, first + stream.batch, device=device)[:, None]
            for run in runs:
                sequence[run.start] = run.packed(ids_B1.expand(-1, run.length)[:, :, None])[:, 0]
            first += stream.batch
        sequence_N = torch.cat([sequence[start] for start in sorted(sequence)])
        return PackedLayout(rows_of_experts(pieces), groups, sequence_N, first)

    def bias_index(self, stream: Stream, device: torch.device) -> Tensor:
        """The stream's square of the joint index, whose diagonal blocks serve text alone and image alone."""
        text_len = 1 if stream.text_BLD is None else stream.text_BLD.shape[1]
        index = joint_index_on(device, self.window, text_len, self.max_text_len_of_initckpt)
        if stream.image_rows_B is None:
            return index[:text_len, :text_len]
        if stream.image_tokens_K is not None:
            tokens = torch.cat((torch.arange(text_len, device=device), text_len + stream.image_tokens_K))
            index = index[tokens][:, tokens]
        return index if stream.joint else index[text_len:, text_len:]


def folds_of(streams: Sequence[Stream]) -> list[Fold | None]:
    """Of the streams' texts, or of their images where there are no texts; None: of images that are whole."""
    masks = [stream.seen_BL if stream.text_mask_BL is None else stream.text_mask_BL for stream in streams]
    return [None if mask_BL is None else Fold.of_mask(mask_BL) for mask_BL in masks]


def embedded(stream: Stream, piece: Piece, images_BLD: Tensor | None) -> Tensor:
    """The packed tokens of a piece, [n, D]."""
    if piece.kind.image:
        rows_BLD = given(images_BLD, "image_BCHW").index_select(0, given(stream.image_rows_B, "image_rows_B"))
        if stream.image_tokens_K is not None:
            rows_BLD = rows_BLD.index_select(1, stream.image_tokens_K)
        return piece.run.packed(rows_BLD)
    return piece.run.packed(given(stream.text_BLD, "text_BLD"))


def lower_order(streams: Sequence[Stream]) -> list[Kind]:
    """Below the VL experts: all text tokens, then all image tokens."""
    order = [Kind(i, False, False, "text") for i, s in enumerate(streams) if s.text_BLD is not None]
    return order + [Kind(i, False, True, "imag") for i, s in enumerate(streams) if s.image_rows_B is not None]


def upper_order(streams: Sequence[Stream]) -> list[Kind]:
    """In the layers with VL experts: text alone, image alone, then everything that takes the VL expert."""
    lower = lower_order(streams)
    order = [kind for kind in lower if not streams[kind.owner].joint]
    order += [kind._replace(expert="vl") for kind in lower if streams[kind.owner].joint]
    return order + [kind._replace(twin=True, expert="vl") for kind in lower if streams[kind.owner].vl_twin]


def rows_of_experts(pieces: Sequence[Piece]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind, run in pieces:
        counts[kind.expert] += run.size
    return counts


def whole(owner: int, pieces: Sequence[Piece], x_ND: Tensor) -> Tensor:
    """The packed tokens of a stream of images alone, [B, L, D]."""
    run = next(run for kind, run in pieces if kind.sequences == (owner, False))
    return run.sequences(x_ND[run.start : run.start + run.size])


def repack(x_ND: Tensor, lower: Sequence[Piece], upper: Sequence[Piece]) -> Tensor:
    """Reorders the packed tokens from the lower to the upper order, and copies what goes on as a twin."""
    rows = by_run([piece.run for piece in lower], x_ND)
    found = {(kind.owner, kind.image): rows[run.start] for kind, run in lower}
    return torch.cat([found[kind.owner, kind.image] for kind, _ in upper])


def leave_unread(
    streams: Sequence[Stream], pieces: list[Piece], layout: PackedLayout
) -> tuple[list[Piece], PackedLayout]:
    """Pieces and layout of the last block, of which only those tokens go on that the streams are read for."""
    if all(stream.reads == "all" for stream in streams):
        return pieces, layout
    left: list[Piece] = []
    on: list[Tensor] = []
    queries: dict[tuple[int, bool], list[Run]] = {}
    start = 0
    for kind, run in pieces:
        stream = streams[kind.owner]
        rows = torch.arange(run.start, run.start + run.size, device=layout.sequence_M.device)
        if stream.reads != "all" and kind.image and stream.joint:
            rows, run = rows[:0], Run(start, 0, run.length)
        elif stream.reads == "class":
            rows, run = run.sequences(rows[:, None])[:, 0, 0], Run(start, run.batch, 1)
        else:
            run = run._replace(start=start)
        left.append(Piece(kind, run))
        if run.batch:
            queries.setdefault(kind.sequences, []).append(run)
        on.append(rows)
        start += run.size
    on_M = torch.cat(on)
    last = PackedLayout(
        experts=rows_of_experts(left),
        groups=[replace(group, queries=of) for group, of in zip(layout.groups, queries.values(), strict=True)],
        sequence_M=layout.sequence_M[on_M],
        num_sequences=layout.num_sequences,
        on_M=on_M,
    )
    return [piece for piece in left if piece.run.batch], last
