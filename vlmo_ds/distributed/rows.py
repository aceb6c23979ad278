"""One rank's rows of the global contrastive logits, in chunks of columns: never more than [B, chunk] at once.

Dimensions: B rows of this rank, G rows of the global batch, C those of a chunk, D width. All arithmetic is in the features' dtype, which is
float32 in training (float64 in parity checks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmo_ds.config import RecipeError

if TYPE_CHECKING:
    from vlmo_ds.distributed.collector import Collector

CHUNK = 8192
NOISE_CHUNK = 1024  # columns whose noise is there at a time: what a processor's cache holds


class Best:
    """The largest value of each of B rows and its column, while columns pass by in chunks."""

    def __init__(self, like_BD: Tensor):
        self.value_B = like_BD.new_full((len(like_BD),), float("-inf"))
        self.column_B = torch.zeros(len(like_BD), dtype=torch.int64, device=like_BD.device)

    def see(self, values_BC: Tensor, first: int) -> None:
        """first: the column that the chunk begins with."""
        value_B, column_B = values_BC.max(1)
        better_B = value_B > self.value_B
        self.value_B = torch.where(better_B, value_B, self.value_B)
        self.column_B = torch.where(better_B, column_B + first, self.column_B)


class Positives:
    """Which columns are positives of which rows: the row's own pair, and all pairs that have one of its keys (such as its image, or the
    words of its caption)."""

    def __init__(self, key_BK: Tensor, key_GK: Tensor, label_B: Tensor):
        """int64 keys of this rank's pairs and of all; label_B: which of all these are."""
        self.key_BK, self.key_GK, self.label_B = key_BK, key_GK, label_B

    def of(self, columns: slice) -> Tensor:
        """[B, C] bool."""
        same_BC = (self.key_BK[:, None] == self.key_GK[None, columns]).any(-1)
        first, end, _ = columns.indices(len(self.key_GK))
        return same_BC | (self.label_B[:, None] == torch.arange(first, end, device=same_BC.device))

    def has(self, column_B: Tensor) -> Tensor:
        """[B] bool: whether a column of each row is one."""
        return (self.key_BK == self.key_GK[column_B]).any(-1) | (column_B == self.label_B)


class Rows(NamedTuple):
    """What B rows of logits come to: their logsumexp, the sum and the number of their positives (their own label where there are no others),
    how many have their largest at a positive, a negative for each where one is drawn."""

    lse_B: Tensor
    positive_B: Tensor
    count_B: Tensor
    right: Tensor
    negative_B: Tensor | None


def rows_of(
    q_BD: Tensor,
    k_GD: Tensor,
    scale: Tensor,
    label_B: Tensor,
    positives: Positives | None,
    draw: Draw | None,
    chunk: int,
) -> Rows:
    """One pass over the columns of scale * q @ k.T."""
    lse_B = q_BD.new_full((len(q_BD),), float("-inf"))
    best, drawn = Best(q_BD), Best(q_BD)
    positive_B, count_B = torch.zeros_like(lse_B), torch.zeros_like(label_B)
    if positives is None:
        positive_B, count_B = scale * (q_BD * k_GD[label_B]).sum(1), torch.ones_like(label_B)
    for first in range(0, len(k_GD), chunk):
        columns = slice(first, first + chunk)
        logits_BC = (q_BD @ k_GD[columns].t()).mul_(scale)
        lse_B = torch.logaddexp(lse_B, logits_BC.logsumexp(1))
        best.see(logits_BC, first)
        if positives is not None:
            same_BC = positives.of(columns)
            positive_B += logits_BC.where(same_BC, 0.0).sum(1)
            count_B += same_BC.sum(1)
        if draw is not None:
            draw.see(drawn, logits_BC, first)
    found_B = best.column_B == label_B if positives is None else positives.has(best.column_B)
    right = found_B.sum().to(q_BD.dtype)
    return Rows(lse_B, positive_B, count_B, right, None if draw is None else drawn.column_B)


class _Contrast(torch.autograd.Function):
    """Both directions of the contrast, with logits recomputed in the backward. The gradient of all columns of one direction is there at
    a time, and written once."""

    @staticmethod
    def forward(ctx, image_BD, text_BD, scale, collector: Collector, positives: Positives | None, draws, chunk: int):
        both_G2D = collector.gather(torch.stack((image_BD, text_BD), dim=1))  # one collective for both modalities
        label_B = labels_of(image_BD, collector)
        found = [
            rows_of(q_BD, both_G2D[:, other], scale, label_B, positives, draw, chunk)
            for q_BD, other, draw in ((image_BD, 1, draws and draws[0]), (text_BD, 0, draws and draws[1]))
        ]
        ctx.save_for_backward(image_BD, text_BD, both_G2D, scale, label_B, *(rows.lse_B for rows in found))
        ctx.collector, ctx.positives, ctx.count_B, ctx.chunk = collector, positives, found[0].count_B, chunk
        loss = sum((rows.lse_B - rows.positive_B / rows.count_B).sum() for rows in found) / 2
        others = [tensor for rows in found for tensor in (rows.right, rows.negative_B) if tensor is not None]
        ctx.mark_non_differentiable(*others)
        return loss, *(value for rows in found for value in (rows.right, rows.negative_B))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        image_BD, text_BD, both_G2D, scale, label_B, *lse = ctx.saved_tensors
        grad = grad / 2
        grads = [torch.zeros_like(image_BD), torch.zeros_like(text_BD)]
        grad_scale = torch.zeros_like(scale)
        grad_GD = torch.empty_like(
            both_G2D[:, 0], memory_format=torch.contiguous_format
        )  # of one modality, then of the other
        for mine, (q_BD, other_BD, lse_B) in enumerate(((image_BD, text_BD, lse[0]), (text_BD, image_BD, lse[1]))):
            k_GD = both_G2D[:, 1 - mine]
            scaled_BD = q_BD * (scale * grad)
            mixed_BD = torch.zeros_like(q_BD)  # of the columns, by their share of the softmax
            for first in range(0, len(k_GD), ctx.chunk):
                k_CD = k_GD[first : first + ctx.chunk]
                share_BC = (q_BD @ k_CD.t()).mul_(scale).sub_(lse_B[:, None]).exp_()
                if ctx.positives is not None:
                    share_BC -= ctx.positives.of(slice(first, first + ctx.chunk)) / ctx.count_B[:, None]
                mixed_BD.addmm_(share_BC, k_CD)
                torch.mm(share_BC.t(), scaled_BD, out=grad_GD[first : first + ctx.chunk])
            if ctx.positives is None:
                mixed_BD -= other_BD
                grad_GD.index_add_(0, label_B, scaled_BD, alpha=-1)
            grads[1 - mine] += ctx.collector.sum_to_owners(grad_GD)
            grads[mine] += mixed_BD * (scale * grad)
            grad_scale += (q_BD * mixed_BD).sum()
        return *grads, grad_scale * grad, None, None, None, None


class _Sigmoid(torch.autograd.Function):
    """Each of this rank's images with each text of all ranks, as a yes or no of its own; logits are computed again in the backward."""

    @staticmethod
    def forward(ctx, image_BD, text_BD, scale, bias, collector: Collector, positives: Positives, chunk: int):
        text_GD = collector.gather(text_BD)
        loss, best = torch.zeros_like(scale), Best(image_BD)
        for first in range(0, len(text_GD), chunk):
            columns = slice(first, first + chunk)
            logits_BC = (image_BD @ text_GD[columns].t()).mul_(scale).add_(bias)
            best.see(logits_BC, first)
            loss = loss - F.logsigmoid(torch.where(positives.of(columns), logits_BC, -logits_BC)).sum()
        ctx.save_for_backward(image_BD, text_GD, scale, bias)
        ctx.collector, ctx.positives, ctx.chunk = collector, positives, chunk
        right = positives.has(best.column_B).sum().to(image_BD.dtype)
        ctx.mark_non_differentiable(right, text_GD)
        return loss, right, text_GD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        image_BD, text_GD, scale, bias = ctx.saved_tensors
        mixed_BD, grad_GD = torch.zeros_like(image_BD), torch.empty_like(text_GD)
        grad_bias = torch.zeros_like(bias)
        scaled_BD = image_BD * (scale * grad)
        for first in range(0, len(text_GD), ctx.chunk):
            columns = slice(first, first + ctx.chunk)
            logits_BC = (image_BD @ text_GD[columns].t()).mul_(scale).add_(bias)
            of_logits_BC = logits_BC.sigmoid_().sub_(ctx.positives.of(columns).to(logits_BC.dtype))
            mixed_BD.addmm_(of_logits_BC, text_GD[columns])
            torch.mm(of_logits_BC.t(), scaled_BD, out=grad_GD[columns])
            grad_bias += of_logits_BC.sum()
        grad_text_BD = ctx.collector.sum_to_owners(grad_GD)
        grad_scale = (image_BD * mixed_BD).sum()
        return mixed_BD * (scale * grad), grad_text_BD, grad_scale * grad, grad_bias * grad, None, None, None


def labels_of(rows_BD: Tensor, collector: Collector) -> Tensor:
    """Which of the global batch this rank's rows are, [B] int64."""
    return collector.first_row(len(rows_BD)) + torch.arange(len(rows_BD), device=rows_BD.device)


def positives_of(rows_BD: Tensor, key_BK: Tensor | None, collector: Collector) -> Positives:
    """key_BK: int64 keys, None: of pairs that share nothing."""
    key_BK = labels_of(rows_BD, collector)[:, None] if key_BK is None else key_BK
    return Positives(key_BK, collector.gather(key_BK), labels_of(rows_BD, collector))


class Contrasted(NamedTuple):
    """loss: the mean of both directions' cross-entropies, summed over this rank's pairs; i2t_right, t2i_right: pairs whose largest logit
    is their own; text_B, image_B: a wrong text for each image, a wrong image for each text (global rows), where they are drawn."""

    loss: Tensor
    i2t_right: Tensor
    text_B: Tensor | None
    t2i_right: Tensor
    image_B: Tensor | None


def contrast(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    collector: Collector,
    draws: tuple[Draw, Draw] | None = None,
    key_BK: Tensor | None = None,
    chunk: int = CHUNK,
) -> Contrasted:
    """Cross-entropy of this rank's images against the texts of all ranks, and of its texts against all images (InfoNCE; CLIP,
    arXiv:2103.00020), and with `draws` (of texts for images, of images for texts) hard negatives by the same logits.

    image_BD, text_BD: features of this rank's pairs, the same number on every rank; scale: 0-d; key_BK: int64 keys of the pairs: those
    that have one in common are positives of each other, and a row's loss is the mean of its positives' (UniCL, arXiv:2204.03610).
    Memory: O(B * chunk + 3 * G * D).
    """
    with torch.autocast(image_BD.device.type, enabled=False):  # in 16 bits the logits of close pairs are all the same
        positives = None if key_BK is None else positives_of(image_BD, key_BK, collector)
        return Contrasted(*_Contrast.apply(image_BD, text_BD, scale, collector, positives, draws, chunk))


def sigmoid_contrast(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    bias: Tensor,
    collector: Collector,
    draws: tuple[Draw, Draw] | None = None,
    key_BK: Tensor | None = None,
    chunk: int = CHUNK,
) -> Contrasted:
    """Every image with every text of all ranks, each a logistic regression of its own: whether they are a pair (SigLIP,
    arXiv:2303.15343). Arguments as of contrast; bias: 0-d, added to all logits. The loss is of this rank's images, and accuracies of
    both directions are that of images. Memory: O(B * chunk + 2 * G * D)."""
    with torch.autocast(image_BD.device.type, enabled=False):
        positives = positives_of(image_BD, key_BK, collector)
        loss, right, text_GD = _Sigmoid.apply(image_BD, text_BD, scale, bias, collector, positives, chunk)
        text_B = image_B = None
        if draws is not None:
            text_B = sample_negatives(image_BD, text_GD, scale, draws[0], chunk=chunk)
            image_B = sample_negatives(text_BD, collector.gather(image_BD.detach()), scale, draws[1], chunk=chunk)
    return Contrasted(loss, right, text_B, right, image_B)


_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele et al., OOPSLA 2014): a bijection whose output bits look random."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def gumbel_noise(seed: int, query_id_B: Tensor, candidate_id_C: Tensor) -> Tensor:
    """[B, C] float32 Gumbel noise, a pure function of (seed, query id, candidate id): the same on every rank."""
    golden = _signed(0x9E3779B97F4A7C15)
    query = mix(mix(query_id_B + _signed(seed * 0x9E3779B97F4A7C15 + 1)) + golden)
    bits = mix(query[:, None] ^ mix(candidate_id_C + golden)[None, :])
    uniform = (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
    return -(-uniform.log()).log()


class Draw:
    """Draws one hard negative for each of B rows from the softmax of its logits over all candidates of another image.

    The Gumbel-max trick (Gumbel 1954): argmax(logit + noise) is a draw from softmax(logit), needs no normalisation,
    works chunk by chunk and cannot underflow. Candidates with the query's image id, or another of its keys, are left out: another
    caption of the same image is not a negative.

    Raises RecipeError when all candidates show one image (the same on every rank, so no rank is left waiting).
    """

    def __init__(
        self, seed: int, query_id_B: Tensor, candidate_id_G: Tensor, query_image_B: Tensor, candidate_image_G: Tensor
    ):
        """query_image_B, candidate_image_G: image ids, or several keys of each, [B, K] and [G, K]."""
        keys_GK = candidate_image_G.view(len(candidate_image_G), -1)
        if bool((keys_GK == keys_GK[0]).any(1).all()):
            raise RecipeError(
                f"itm needs a negative, but all {len(keys_GK)} pairs of the ranks' micro-batches have image_id "
                f"{int(keys_GK[0, 0])}{', or its caption' if keys_GK.shape[1] > 1 else ''}: use micro-batches of at least two different images"
            )
        self.seed, self.query_id_B, self.candidate_id_G = seed, query_id_B, candidate_id_G
        self.query_key_BK, self.candidate_key_GK = query_image_B.view(len(query_image_B), -1), keys_GK

    def see(self, best: Best, logits_BC: Tensor, first: int) -> None:
        """Candidates from `first` on."""
        for part_BC in logits_BC.split(NOISE_CHUNK, dim=1):
            columns = slice(first, first + part_BC.shape[1])
            noisy_BC = gumbel_noise(self.seed, self.query_id_B, self.candidate_id_G[columns]).to(part_BC.dtype)
            noisy_BC += part_BC
            same_BC = (self.query_key_BK[:, None] == self.candidate_key_GK[None, columns]).any(-1)
            best.see(noisy_BC.masked_fill_(same_BC, float("-inf")), first)
            first = columns.stop


@torch.no_grad()
def sample_negatives(
    q_BD: Tensor, k_GD: Tensor, scale: Tensor, draw: Draw, floor: float = 0.0, chunk: int = CHUNK
) -> Tensor:
    """Negatives by logits that nothing else needs: global row numbers, [B] int64.

    floor: what is added to each candidate's share of the softmax (over all candidates, as the reference of BLIP does).
    """
    best = Best(q_BD)
    whole_B = q_BD.new_full((len(q_BD),), float("-inf"))
    for first in range(0, len(k_GD) if floor else 0, chunk):
        whole_B = torch.logaddexp(whole_B, (q_BD @ k_GD[first : first + chunk].t()).mul_(scale).logsumexp(1))
    for first in range(0, len(k_GD), chunk):
        logits_BC = (q_BD @ k_GD[first : first + chunk].t()).mul_(scale)
        if floor:
            logits_BC = logits_BC.sub_(whole_B[:, None]).exp_().add_(floor).log_()
        draw.see(best, logits_BC, first)
    return best.column_B
