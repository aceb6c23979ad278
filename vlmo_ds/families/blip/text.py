"""BLIP's text stack (MED, arXiv:2201.12086, section 3.1): one stack of BERT's layers with two sets of self-attention.

Text is read (in both directions), matched (as that, with cross-attention to an image) or decoded (each word sees those
before it, with self-attention of its own, and the image). All that but self-attention has the same weights; a walk takes
sequences of all three kinds together. Padding is not computed.

Dimensions: R sequences, L tokens of the longest, N tokens of all together, I images, S tokens of an image, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo_ds.blocks.cache import Cache, attend_to_images, attend_to_words
from vlmo_ds.blocks.fold import Fold, joined
from vlmo_ds.blocks.layers import GeluLinear, wide
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.objectives.captioning import word_losses

EPS = 1e-12


class Look(NamedTuple):
    """Sequences `first` to `first + times * I - 1`, `times` runs of one for each of I images; images: the I rows of the table of
    images that they look at, None: all of it in order."""

    first: int
    times: int
    images: Tensor | None = None


class Own(NamedTuple):
    """Sequences that have one set of self-attention: their fold, and what a place may look at, bool [R or 1, 1, 1 or L, L]."""

    attention: SelfAttention
    fold: Fold
    mask: Tensor


class Projections(nn.Module):
    """Queries of tokens, keys and values of the same or of others."""

    def __init__(self, dim: int, num_heads: int, context_dim: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)

    def heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D/H]."""
        return x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)


class Output(nn.Module):
    """Linear layer, dropout, and the norm of the sum with what went in."""

    def __init__(self, linear: nn.Linear, dropout: float):
        super().__init__()
        self.dense = linear
        self.LayerNorm = nn.LayerNorm(linear.out_features, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + before)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.self = Projections(dim, num_heads, dim, dropout)
        self.output = Output(nn.Linear(dim, dim), dropout)

    def forward(self, x_ND: Tensor, fold: Fold, mask: Tensor) -> Tensor:
        of = self.self
        qkv = torch.cat((of.query(x_ND), of.key(x_ND), of.value(x_ND)), dim=-1)
        q, k, v = (of.heads(part) for part in fold.padded(qkv).chunk(3, dim=-1))
        return self.output(fold.folded(joined(of.attend(q, k, v, mask))), x_ND)

    def step(self, x_RLD: Tensor, cache: Cache, layer: int) -> Tensor:
        """The L newest words of R texts, whose keys and values join those of the words before them in the cache."""
        of = self.self
        q, k, v = (of.heads(part(x_RLD)) for part in (of.query, of.key, of.value))
        return self.output(joined(attend_to_words(q, k, v, cache, layer)), x_RLD)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, context_dim: int, dropout: float):
        super().__init__()
        self.self = Projections(dim, num_heads, context_dim, dropout)
        self.output = Output(nn.Linear(dim, dim), dropout)

    def forward(self, x_ND: Tensor, fold: Fold, image_ISD: Tensor, looks: Sequence[Look]) -> Tensor:
        """image_ISD: the table of images; looks: of all sequences in order. Keys and values are computed once an image, and
        again in the backward pass: an image has more tokens than a text."""
        of = self.self
        q_RHLC = of.heads(fold.padded(of.query(x_ND)))
        look = partial(self.looked, looks)
        if torch.is_grad_enabled():
            again = bool(of.dropout and self.training)
            look = partial(checkpoint, look, use_reentrant=False, preserve_rng_state=again)
        return self.output(fold.folded(joined(look(q_RHLC, image_ISD))), x_ND)

    def looked(self, looks: Sequence[Look], q_RHLC: Tensor, image_ISD: Tensor) -> Tensor:
        """[R, H, L, D/H] each. The sequences that look at an image are one sequence of queries."""
        keys, values = self.memory(image_ISD)
        found = []
        for first, times, rows in looks:
            k, v = (keys, values) if rows is None else (keys[rows], values[rows])
            images = len(k)
            q = q_RHLC[first : first + times * images].unflatten(0, (times, images))
            out = self.self.attend(q.permute(1, 2, 0, 3, 4).flatten(2, 3), k, v)
            found.append(out.unflatten(2, (times, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1))
        return torch.cat(found)

    def memory(self, image_ISD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [I, H, S, D/H]."""
        return self.self.heads(self.self.key(image_ISD)), self.self.heads(self.self.value(image_ISD))

    def step(self, x_RLD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """R = n * I texts, n for each of I images in turn, whose keys and values [I, H, S, D/H] are given."""
        q = self.self.heads(self.self.query(x_RLD))
        return self.output(joined(attend_to_images(q, keys, values)), x_RLD)


class Intermediate(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.dense = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Layer(nn.Module):
    """Post-norm layer of BERT (arXiv:1810.04805) with cross-attention. Self-attention is given with each call."""

    def __init__(self, config: BLIPSettings):
        super().__init__()
        dim, heads, dropout = config.text_width, config.text_heads, config.text_dropout
        self.attention = SelfAttention(dim, heads, dropout)
        self.crossattention = CrossAttention(dim, heads, config.vision_width, dropout)
        self.intermediate = Intermediate(dim, config.text_hidden)
        self.output = Output(GeluLinear(config.text_hidden, dim), dropout)

    def forward(
        self, x_ND: Tensor, own: Sequence[Own], whole: Fold, image_ISD: Tensor | None, looks: Sequence[Look]
    ) -> Tensor:
        pieces = x_ND.split([len(part.fold.places_N) for part in own])
        x_ND = torch.cat([of.attention(piece, of.fold, of.mask) for piece, of in zip(pieces, own, strict=True)])
        if image_ISD is not None:
            x_ND = self.crossattention(x_ND, whole, image_ISD, looks)
        return self.output(self.intermediate(x_ND), x_ND)

    def step(
        self, x_RLD: Tensor, attention: SelfAttention, memory: tuple[Tensor, Tensor], cache: Cache, layer: int
    ) -> Tensor:
        """A decoder's newest words."""
        x_RLD = self.crossattention.step(attention.step(x_RLD, cache, layer), *memory)
        return self.output(self.intermediate(x_RLD), x_RLD)


class WordTable(nn.Module):
    """The word table, looked up and multiplied with in its own forward: under ZeRO-3 its rows are there only inside it."""

    def __init__(self, words: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, dim))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, following_N: Tensor | None = None, smoothing: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Ids [...] -> [..., D]. Hidden states [..., D] with the vocabulary's bias -> logits [..., V] in float32 at least; with
        the words that follow as well -> as word_losses."""
        if bias is None:
            return F.embedding(x, self.weight)
        if following_N is None:
            return wide(F.linear(x, self.weight, bias))
        return word_losses(x, self.weight.t(), following_N, bias, smoothing)


class Embeddings(nn.Module):
    """Word and position, norm, dropout."""

    def __init__(self, config: BLIPSettings):
        super().__init__()
        self.word_embeddings = WordTable(config.vocab_size, config.text_width)
        self.position_embeddings = nn.Embedding(config.positions, config.text_width)
        self.LayerNorm = nn.LayerNorm(config.text_width, eps=EPS)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids, places: int64 of one shape [...] -> [..., D]."""
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(places)))


class Layers(nn.Module):
    """What BERT's names have as `encoder`."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class TextEncoder(nn.Module):
    """The stack, with the self-attention of texts that are read or matched."""

    @property
    def layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.encoder.layer))

    def __init__(self, config: BLIPSettings, recomputed: Recomputed):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers([Layer(config) for _ in range(config.text_layers)])
        self.recomputed = recomputed

    def forward(
        self,
        ids_RL: Tensor,
        lengths_R: Tensor,
        image_ISD: Tensor | None = None,
        looks: Sequence[Look] = (),
        decoder: Sequence[SelfAttention] = (),
        decoded: int = 0,
    ) -> tuple[Tensor, Fold]:
        """Tokens [N, D] of all sequences, and their fold. looks: at which images sequences look, none: at none; the last `decoded`
        sequences have the decoder's self-attention, and see the words before them alone."""
        whole = Fold(lengths_R, ids_RL.shape[1])
        reading, writing = (Fold(part, whole.length) for part in lengths_R.tensor_split([len(lengths_R) - decoded]))
        places = torch.arange(whole.length, device=ids_RL.device).expand_as(ids_RL)
        x_ND = self.embeddings(whole.folded(ids_RL), whole.folded(places))
        for i, layer in enumerate(self.layers):
            own = []
            if reading.batch:
                own.append(Own(layer.attention, reading, reading.valid_BL[:, None, None]))
            if decoded:
                own.append(Own(decoder[i], writing, writing.causal[None, None]))
            x_ND = self.recomputed(layer, i, x_ND, own, whole, image_ISD, looks)
        return x_ND, whole

    def first_tokens(self, x_ND: Tensor, fold: Fold) -> Tensor:
        """[R, D] of the sequences' first tokens."""
        ends_R = fold.valid_BL.sum(1).cumsum(0)
        return x_ND[torch.cat((ends_R.new_zeros(1), ends_R[:-1]))]

    def memory(self, image_ISD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of images, of every layer [I, H, S, D/H]."""
        return [layer.crossattention.memory(image_ISD) for layer in self.layers]

    def step(
        self,
        ids_RL: Tensor,
        first: int,
        memory: Sequence[tuple[Tensor, Tensor]],
        decoder: Sequence[SelfAttention],
        cache: Cache,
    ) -> Tensor:
        """The L newest words of R texts that have `first` words already -> [R, L, D]."""
        places = torch.arange(first, first + ids_RL.shape[1], device=ids_RL.device).expand_as(ids_RL)
        x_RLD = self.embeddings(ids_RL, places)
        for i, layer in enumerate(self.layers):
            x_RLD = layer.step(x_RLD, decoder[i], memory[i], cache, i)
        return x_RLD


class Transform(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """BERT's head of words; its vocabulary is the word table."""

    def __init__(self, config: BLIPSettings):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config.text_width)

    def forward(
        self, x: Tensor, table: WordTable, following_N: Tensor | None = None, smoothing: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As the table's forward for hidden states."""
        return table(self.transform(x), self.bias, following_N, smoothing)


class TextDecoder(nn.Module):
    """What decoding has of its own: self-attention of every layer, and the head of words."""

    def __init__(self, config: BLIPSettings):
        super().__init__()

        def layer() -> nn.Module:
            return nn.ModuleDict(
                {"attention": SelfAttention(config.text_width, config.text_heads, config.text_dropout)}
            )

        self.bert = nn.ModuleDict({"encoder": Layers([layer() for _ in range(config.text_layers)])})
        self.cls = nn.ModuleDict({"predictions": Predictions(config)})

    @property
    def attention(self) -> list[SelfAttention]:
        """Of every layer."""
        layers = cast(list[nn.ModuleDict], list(cast(Layers, self.bert["encoder"]).layer))
        return [cast(SelfAttention, layer["attention"]) for layer in layers]

    @property
    def predictions(self) -> Predictions:
        return cast(Predictions, self.cls["predictions"])
