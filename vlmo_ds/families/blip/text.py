"""BLIP's text stack (MED, arXiv:2201.12086, section 3.1): one stack of BERT's layers with two sets of self-attention.

Text is read (in both directions), matched (as that, with cross-attention to an image) or decoded (each word sees those
before it, with self-attention of its own, and the image). All that but self-attention has the same weights; a walk takes
sequences of all three kinds together. Padding is not computed.

Dimensions: R sequences, L tokens of the longest, N tokens of all together, I images, S tokens of an image, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo_ds.blocks.attention import attend
from vlmo_ds.blocks.cache import Cache, attend_to_images, attend_to_words
from vlmo_ds.blocks.fold import Fold, heads, joined
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import GeluLinear, wide
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.families.blip.config import BLIPSettings
from vlmo_ds.objectives.captioning import word_losses

EPS = 1e-12
# of images in a layer: keys, values [I, H, S, D/H], valid bool [I, S] or None: all
Memory = tuple[Tensor, Tensor, Tensor | None]


class Look(NamedTuple):
    """Sequences `first` to `first + times * I - 1`, `times` runs of one for each of I images; images: the I rows of the table of
    images that they look at, None: all of it in order; valid: bool [rows of the table, S], which tokens of an image there are,
    None: all."""

    first: int
    times: int
    images: Tensor | None = None
    valid: Tensor | None = None


class Own(NamedTuple):
    """Sequences that have one set of self-attention: their fold, and what a place may look at, bool [R or 1, 1, 1 or L, L]."""

    attention: SelfAttention
    fold: Fold
    mask: Tensor


class Projections(nn.Module):
    """Queries of tokens, keys and values of the same or of others."""

    cheap = True  # keys and values of an image are computed again in the backward pass

    def __init__(self, dim: int, num_heads: int, context_dim: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)

    def heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D/H]."""
        return heads(x_BLD, self.num_heads)

    def memory(self, image_ISD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [I, H, S, D/H] of images."""
        return self.heads(self.key(image_ISD)), self.heads(self.value(image_ISD))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return attend(q, k, v, mask, rate)


class Output(nn.Module):
    """Linear layer, dropout, and the norm of the sum with what went in."""

    def __init__(self, linear: nn.Linear, dropout: float):
        super().__init__()
        self.dense = linear
        self.LayerNorm = LayerNorm(linear.out_features, eps=EPS)
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


def looked(of: Projections, x_ND: Tensor, fold: Fold, image_ISD: Tensor, looks: Sequence[Look]) -> Tensor:
    """What tokens find in images, [N, D]. image_ISD: the table of images; looks: of all sequences in order. Keys and values are
    computed once an image, and again in the backward pass where `cheap`: an image has more tokens than a text."""

    def found(q_RHLC: Tensor, image_ISD: Tensor) -> Tensor:
        """The sequences that look at an image are one sequence of queries."""
        keys, values = of.memory(image_ISD)
        parts = []
        for first, times, rows, valid in looks:
            k, v = (keys, values) if rows is None else (keys.index_select(0, rows), values.index_select(0, rows))
            mask = valid if valid is None or rows is None else valid[rows]
            images = len(k)
            q = q_RHLC[first : first + times * images].unflatten(0, (times, images))
            out = of.attend(q.permute(1, 2, 0, 3, 4).flatten(2, 3), k, v, None if mask is None else mask[:, None, None])
            parts.append(out.unflatten(2, (times, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1))
        return torch.cat(parts)

    q_RHLC = of.heads(fold.padded(of.query(x_ND)))
    if of.cheap and torch.is_grad_enabled():
        again = bool(of.dropout and of.training)
        return fold.folded(joined(checkpoint(found, q_RHLC, image_ISD, use_reentrant=False, preserve_rng_state=again)))
    return fold.folded(joined(found(q_RHLC, image_ISD)))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, context_dim: int, dropout: float):
        super().__init__()
        self.self = Projections(dim, num_heads, context_dim, dropout)
        self.output = Output(nn.Linear(dim, dim), dropout)

    def forward(self, x_ND: Tensor, fold: Fold, image_ISD: Tensor, looks: Sequence[Look]) -> Tensor:
        """As `looked`."""
        return self.output(looked(self.self, x_ND, fold, image_ISD, looks), x_ND)

    def step(self, x_RLD: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """R = n * I texts, n for each of I images in turn, whose keys and values [I, H, S, D/H] are given; valid: bool [I, S],
        which of their tokens there are, None: all."""
        q = self.self.heads(self.self.query(x_RLD))
        return self.output(joined(attend_to_images(q, keys, values, valid)), x_RLD)


class TwinOutput(nn.Module):
    """As Output, of what was found in two images: a linear layer of each, and their mean, or a linear layer of both."""

    def __init__(self, dim: int, dropout: float, merged: bool):
        super().__init__()
        self.dense0 = nn.Linear(dim, dim)
        self.dense1 = nn.Linear(dim, dim)
        self.merge_layer = nn.Linear(2 * dim, dim) if merged else None
        self.LayerNorm = LayerNorm(dim, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, first: Tensor, second: Tensor, before: Tensor) -> Tensor:
        first, second = self.dense0(first), self.dense1(second)
        if self.merge_layer is None:
            both = (first + second) / 2
        else:
            both = self.merge_layer(torch.cat((first, second), dim=-1))
        return self.LayerNorm(self.dropout(both) + before)


class TwinCrossAttention(nn.Module):
    """Two cross-attentions, one for each of a text's two images (arXiv:2201.12086, figure 5, NLVR2)."""

    def __init__(self, dim: int, num_heads: int, context_dim: int, dropout: float, merged: bool):
        super().__init__()
        self.self0 = Projections(dim, num_heads, context_dim, dropout)
        self.self1 = Projections(dim, num_heads, context_dim, dropout)
        self.output = TwinOutput(dim, dropout, merged)

    def forward(self, x_ND: Tensor, fold: Fold, image_ISD: Tensor, looks: Sequence[Look]) -> Tensor:
        """As CrossAttention's; image_ISD: the first images of all texts, then the second ones."""
        first, second = image_ISD.chunk(2)
        found = (looked(of, x_ND, fold, part, looks) for of, part in ((self.self0, first), (self.self1, second)))
        return self.output(*found, x_ND)


class Intermediate(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.dense = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Layer(nn.Module):
    """Post-norm layer of BERT (arXiv:1810.04805) with cross-attention. Self-attention is given with each call."""

    def __init__(self, config: BLIPSettings, crossattention: nn.Module):
        super().__init__()
        dim, heads, dropout = config.text_width, config.text_heads, config.text_dropout
        self.attention = SelfAttention(dim, heads, dropout)
        self.crossattention = crossattention
        self.intermediate = Intermediate(dim, config.text_hidden)
        self.output = Output(GeluLinear(config.text_hidden, dim), dropout)

    def forward(
        self, x_ND: Tensor, own: Sequence[Own], looking: Fold, image_ISD: Tensor | None, looks: Sequence[Look]
    ) -> Tensor:
        """looking: the fold of those that look at an image, which come last."""
        pieces = x_ND.split([part.fold.count for part in own])
        x_ND = torch.cat([of.attention(piece, of.fold, of.mask) for piece, of in zip(pieces, own, strict=True)])
        if image_ISD is not None:
            alone_MD, x_ND = x_ND.tensor_split([len(x_ND) - looking.count])
            x_ND = torch.cat((alone_MD, self.crossattention(x_ND, looking, image_ISD, looks)))
        return self.output(self.intermediate(x_ND), x_ND)

    def step(self, x_RLD: Tensor, attention: SelfAttention, memory: Memory, cache: Cache, layer: int) -> Tensor:
        """A decoder's newest words."""
        crossattention = cast(CrossAttention, self.crossattention)
        x_RLD = crossattention.step(attention.step(x_RLD, cache, layer), *memory)
        return self.output(self.intermediate(x_RLD), x_RLD)


class WordTable(nn.Module):
    """The word table, looked up and multiplied with in its own forward: under ZeRO-3 its rows are there only inside it."""

    def __init__(self, words: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, dim))

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        following_N: Tensor | None = None,
        smoothing: float = 0.0,
        weight_N: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Ids [...] -> [..., D]. Hidden states [..., D] with the vocabulary's bias -> logits [..., V] in float32 at least; with
        the words that follow as well -> as word_losses."""
        if bias is None:
            return F.embedding(x, self.weight)
        if following_N is None:
            return wide(F.linear(x, self.weight, bias))
        return word_losses(x, self.weight, following_N, bias, smoothing, weight_N, table=True)


class Embeddings(nn.Module):
    """Word and position, norm, dropout."""

    def __init__(self, config: BLIPSettings):
        super().__init__()
        self.word_embeddings = WordTable(config.vocab_size, config.text_width)
        self.position_embeddings = nn.Embedding(config.positions, config.text_width)
        self.LayerNorm = LayerNorm(config.text_width, eps=EPS)
        self.dropout = nn.Dropout(config.text_dropout)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids, places: int64 of one shape [...] -> [..., D]."""
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(places)))


class Layers(nn.Module):
    """What BERT's names have as `encoder`."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


def at_images(config: BLIPSettings, layer: int) -> CrossAttention:
    """Cross-attention of a layer to an image."""
    return CrossAttention(config.text_width, config.text_heads, config.vision_width, config.text_dropout)


def at_texts(config: BLIPSettings, layer: int) -> CrossAttention:
    """Cross-attention of a layer to the states of a text."""
    return CrossAttention(config.text_width, config.text_heads, config.text_width, config.text_dropout)


def at_two_images(config: BLIPSettings, layer: int) -> TwinCrossAttention:
    """Cross-attention of a layer to two images; the upper half of the layers merges what it finds by a linear layer."""
    of = (config.text_width, config.text_heads, config.vision_width, config.text_dropout)
    return TwinCrossAttention(*of, merged=2 * layer >= config.text_layers)


class TextEncoder(nn.Module):
    """The stack, with the self-attention of texts that are read or matched."""

    @property
    def layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.encoder.layer))

    def __init__(
        self,
        config: BLIPSettings,
        recomputed: Recomputed,
        crossattention: Callable[[BLIPSettings, int], nn.Module] = at_images,
    ):
        """crossattention: (settings, number of a layer) -> its cross-attention."""
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers([Layer(config, crossattention(config, i)) for i in range(config.text_layers)])
        self.recomputed = recomputed

    def forward(
        self,
        ids_RL: Tensor,
        lengths_R: Tensor,
        image_ISD: Tensor | None = None,
        looks: Sequence[Look] = (),
        decoder: Sequence[SelfAttention] = (),
        decoded: int = 0,
        alone: int = 0,
    ) -> tuple[Tensor, Fold]:
        """Tokens [N, D] of all sequences, and their fold. image_ISD: the table of images, None: nothing is looked at; the first
        `alone` sequences look at none, looks: at which the others do, counted from there; the last `decoded` sequences have the
        decoder's self-attention, and see the words before them alone."""
        whole = Fold(lengths_R, ids_RL.shape[1])
        reading, writing = (Fold(part, whole.length) for part in lengths_R.tensor_split([len(lengths_R) - decoded]))
        looking = Fold(lengths_R[alone:], whole.length) if alone else whole
        places = torch.arange(whole.length, device=ids_RL.device).expand_as(ids_RL)
        x_ND = self.embeddings(whole.folded(ids_RL), whole.folded(places))
        for i, layer in enumerate(self.layers):
            own = []
            if reading.batch:
                own.append(Own(layer.attention, reading, reading.valid_BL[:, None, None]))
            if decoded:
                own.append(Own(decoder[i], writing, writing.causal[None, None]))
            x_ND = self.recomputed(layer, i, x_ND, own, looking, image_ISD, looks)
        return x_ND, whole

    def first_tokens(self, x_ND: Tensor, fold: Fold) -> Tensor:
        """[R, D] of the sequences' first tokens."""
        ends_R = fold.valid_BL.sum(1).cumsum(0)
        return x_ND[torch.cat((ends_R.new_zeros(1), ends_R[:-1]))]

    def memory(self, image_ISD: Tensor, valid_IS: Tensor | None = None) -> list[Memory]:
        """What every layer has of images."""
        crossattentions = [cast(CrossAttention, layer.crossattention) for layer in self.layers]
        return [(*one.self.memory(image_ISD), valid_IS) for one in crossattentions]

    def step(
        self,
        ids_RL: Tensor,
        first: int,
        memory: Sequence[Memory],
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
        self.LayerNorm = LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """BERT's head of words; its vocabulary is the word table."""

    def __init__(self, config: BLIPSettings):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config.text_width)

    def forward(
        self,
        x: Tensor,
        table: WordTable,
        following_N: Tensor | None = None,
        smoothing: float = 0.0,
        weight_N: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As the table's forward for hidden states."""
        return table(self.transform(x), self.bias, following_N, smoothing, weight_N)


class TextDecoder(nn.Module):
    """What decoding has of its own beside the encoder: self-attention of every layer, and the head of words."""

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


class AnswerDecoder(nn.Module):
    """A decoder with all weights of its own, which looks at the states of a question."""

    def __init__(self, config: BLIPSettings, recomputed: Recomputed):
        super().__init__()
        self.bert = TextEncoder(config, recomputed, at_texts)
        self.cls = nn.ModuleDict({"predictions": Predictions(config)})

    @property
    def attention(self) -> list[SelfAttention]:
        """Of every layer."""
        return [layer.attention for layer in self.bert.layers]

    def hidden(self, ids_AL: Tensor, lengths_A: Tensor, question_QSD: Tensor, look: Look) -> Tensor:
        """[N, D] of the words of A texts together, each of which sees those before it and a question's states."""
        return self.bert(ids_AL, lengths_A, question_QSD, [look], self.attention, len(ids_AL))[0]

    def words(self, hidden: Tensor, *following: Any) -> Any:
        """Hidden states [..., D] -> logits [..., V] of the word after each; with what word_losses asks for -> what it gives."""
        return self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings, *following)

    def step(self, ids_RL: Tensor, first: int, memory: Sequence[Memory], cache: Cache) -> Tensor:
        """As TextEncoder.step -> logits [R, V] of the word after the newest."""
        return self.words(self.bert.step(ids_RL, first, memory, self.attention, cache)[:, -1])
