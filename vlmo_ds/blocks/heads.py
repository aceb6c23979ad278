"""Text embeddings and task heads, with the official parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.attention import attend
from vlmo_ds.blocks.fold import Fold, heads, joined
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import Mlp, unit
from vlmo_ds.blocks.position import sincos_positions
from vlmo_ds.blocks.vit import Block
from vlmo_ds.objectives.captioning import word_losses


class TextEmbeddings(nn.Module):
    """BERT's embeddings (arXiv:1810.04805): word + token type 0 (+ position), LayerNorm, dropout.

    `position_embeddings` is used only with absolute positions; it is always there, as in the official checkpoints.
    """

    position_ids: Tensor

    def __init__(self, vocab_size: int, embed_dim: int, max_text_len: int, absolute_positions: bool, dropout: float):
        super().__init__()
        self.absolute_positions = absolute_positions
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_text_len, embed_dim)
        self.token_type_embeddings = nn.Embedding(2, embed_dim)
        self.LayerNorm = LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(max_text_len)[None])

    def forward(self, ids_BL: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, D]; L at most max_text_len."""
        if ids_BL.shape[1] > self.position_ids.shape[1]:
            raise ValueError(f"text of {ids_BL.shape[1]} tokens, the model takes at most {self.position_ids.shape[1]}")
        x_BLD = self.word_embeddings(ids_BL) + self.token_type_embeddings(ids_BL.new_zeros(1))
        if self.absolute_positions:
            x_BLD = x_BLD + self.position_embeddings(self.position_ids[:, : ids_BL.shape[1]])
        return self.dropout(self.LayerNorm(x_BLD))


class Pooler(nn.Module):
    """Linear and tanh on the class token."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, cls_BD: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls_BD))


class ITMHead(nn.Module):
    """Image-text matching: [B, D] pooled -> [B, 2] logits, index 1 = matched."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(dim, 2)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.fc(x_BD)


class ITCHead(nn.Module):
    """Contrastive projection: [B, D] class token -> [B, D] features of unit length, float32 at least."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(dim, dim, bias=False)

    def forward(self, cls_BD: Tensor) -> Tensor:
        return unit(self.fc(cls_BD))


class MLMTransform(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """BERT's masked-language-modelling head: [M, D] -> [M, vocab_size] logits."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.transform = MLMTransform(dim)
        self.decoder = nn.Linear(dim, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x_MD: Tensor) -> Tensor:
        return self.decoder(self.transform(x_MD)) + self.bias


class TargetLinear(nn.Linear):
    """[M, D] -> [M, targets]. Its weight is used in its own forward: under ZeRO-3 it is there only inside it."""

    def forward(self, x_MD: Tensor, label_M: Tensor | None = None, smoothing: float = 0.0) -> Any:  # type: ignore[override]  # a module's forward is its own
        """Logits, or values to be regressed; with labels what word_losses gives, whose logits are there in chunks, a share `smoothing` of the
        target being spread over the other ones."""
        if label_M is None:
            return super().forward(x_MD)
        spread = (
            smoothing * self.out_features / (self.out_features - 1) if smoothing else 0.0
        )  # word_losses spreads over all
        return word_losses(x_MD, self.weight, label_M, self.bias, spread, table=True)


class MIMHead(nn.Module):
    """Masked-image-modelling head: [M, D] -> [M, target_dim], one linear layer (BEiT, SimMIM arXiv:2111.09886)."""

    def __init__(self, dim: int, target_dim: int):
        super().__init__()
        self.fc = TargetLinear(dim, target_dim)

    def forward(self, tokens_BLD: Tensor, mask_BP: Tensor, label_M: Tensor | None = None):
        """Class token and patches, those of mask_BP (bool) having seen the mask token -> [M, target_dim] of these, image after image; label_M:
        as of TargetLinear."""
        return self.fc(tokens_BLD[:, 1:][mask_BP], label_M)


class PatchAggregation(nn.Module):
    """Blocks over the class token of a stack's last block and the patches of an earlier one, which have to tell masked patches from what the
    class token holds of the image (BEiT v2, arXiv:2208.06366, section 2.3)."""

    def __init__(self, dim: int, num_heads: int, depth: int, layer_scale: float | None, drop_path_rate: float):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path_rate, key_bias=False, layer_scale=layer_scale) for _ in range(depth)
        )

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor | None) -> Tensor:
        """[B, 1 + P, D] -> the same; bias_HLL: of positions."""
        for block in self.blocks:
            x_BLD = block(x_BLD, bias_HLL)
        return x_BLD


class MIMDecoder(nn.Module):
    """Predicts masked patches from those that an encoder has seen (MAE, arXiv:2111.06377), by one block: a masked patch is a query, the mask
    token at its position, and looks at the seen tokens at theirs, not at other masked ones (CrossMAE, arXiv:2401.14391).

    window: patches of a side; dim: a multiple of 4, for positions of sines and cosines.
    """

    position_PD: Tensor

    def __init__(self, dim: int, num_heads: int, hidden: int, window: int, target_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("position_PD", sincos_positions(window, dim), persistent=False)
        self.norm1, self.norm_seen = LayerNorm(dim, eps=1e-6), LayerNorm(dim, eps=1e-6)
        self.query, self.key_value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm2, self.norm = LayerNorm(dim, eps=1e-6), LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.fc = TargetLinear(dim, target_dim)

    def forward(self, tokens_BLD: Tensor, mask_BP: Tensor, label_M: Tensor | None = None):
        """Class token and patches, of which those of mask_BP (bool) were not seen -> [M, target_dim] of these, image after image; label_M: as
        of TargetLinear."""
        masked, seen = Fold.of_mask(mask_BP), Fold.of_mask(F.pad(~mask_BP, (1, 0), value=True))
        position_PD = self.position_PD.to(tokens_BLD.dtype)
        at_ND = seen.folded(F.pad(position_PD, (0, 0, 1, 0)).expand(len(mask_BP), -1, -1))
        key_value_NC = self.key_value(self.norm_seen(seen.folded(tokens_BLD) + at_ND))
        k, v = (heads(part, self.num_heads) for part in seen.padded(key_value_NC).chunk(2, dim=-1))
        x_MD = self.mask_token + masked.folded(position_PD.expand(len(mask_BP), -1, -1))
        q = heads(masked.padded(self.query(self.norm1(x_MD))), self.num_heads)
        out_MD = masked.folded(joined(attend(q, k, v, seen.valid_BL[:, None, None])))
        x_MD = x_MD + self.proj(out_MD)
        return self.fc(self.norm(x_MD + self.mlp(self.norm2(x_MD))), label_M)


def classifier(dim: int, hidden: int, classes: int) -> nn.Sequential:
    """The heads of VQA and NLVR2: [B, dim] pooled -> [B, classes] logits; members 0, 1 and 3 have weights."""
    return nn.Sequential(nn.Linear(dim, hidden), LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))
