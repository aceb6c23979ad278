"""The visual tokenizer of BEiT v2 (VQ-KD, arXiv:2208.06366), with its official parameter names.

Dimensions: B images, P patches of one in g rows of g, D width, K codes of width C, T width of the teacher's features, N vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import given, init_weights, normalize, unit, wide
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.blocks.vit import EPS, Block, drop_path_rates
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.outside import Outside, opened_teacher
from vlmo_ds.families.step import Batch, FamilyModel, StepOutput, added
from vlmo_ds.families.vqkd import FAMILY
from vlmo_ds.families.vqkd.config import DEAD, PIXELS, VQKDSettings
from vlmo_ds.objectives.quantize import (
    commitment,
    first_by_place,
    kmeans,
    members,
    moved,
    nearest,
    perplexity,
    places_of,
    straight_through,
)

VECTORS_A_CODE = 64  # of the first step's, for the start by k-means
CANDIDATES = 256  # codes that a step replaces at most
LEAST_VARIANCE = 1e-6  # of a teacher's component over the mean of all


class Projection(nn.Module):
    """Pixels, or codes, of each patch to the width of a stack."""

    def __init__(self, channels: int, size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=size, stride=size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class Stack(nn.Module):
    """A ViT with absolute positions. Its last norm, of the patches alone, has the name that BEiT's has where patches are averaged."""

    def __init__(
        self,
        channels: int,
        size: int,
        patches: int,
        dim: int,
        depth: int,
        heads: int,
        rate: float,
        recomputed: Recomputed,
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.patch_embed = Projection(channels, size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, r, key_bias=False) for r in drop_path_rates(rate, depth))
        self.fc_norm = LayerNorm(dim, eps=EPS)
        self.recomputed = recomputed

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]."""
        x_BPD = self.patch_embed(x_BCHW)
        x_BLD = torch.cat((self.cls_token.expand(len(x_BPD), -1, -1), x_BPD), dim=1) + self.pos_embed
        for i, block in enumerate(self.blocks):
            x_BLD = self.recomputed(block, i, x_BLD)
        return self.fc_norm(x_BLD[:, 1:])


class Embedding(nn.Module):
    """The codes, and what the reference keeps beside them of its start by k-means."""

    weight: Tensor  # [K, C]
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        start = F.normalize(torch.randn(codes, width), dim=1)
        self.register_buffer("weight", start)
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", start.clone())
        self.register_buffer("initted", torch.zeros(1))


def as_rows(x_BCgg: Tensor) -> Tensor:
    """[B, C, g, g] -> [B * P, C]."""
    return x_BCgg.flatten(2).transpose(1, 2).flatten(0, 1)


class Quantized(NamedTuple):
    """vector, code: [B, C, g, g], of unit length and float32 at least; token [B, P] int64."""

    vector: Tensor
    code: Tensor
    token: Tensor

    @property
    def rows_NC(self) -> Tensor:
        """The vectors of all patches, image after image, without gradient."""
        return as_rows(self.vector.detach())


class Quantizer(nn.Module):
    """A codebook of unit vectors that follows the vectors nearest to each. Nothing of it has a gradient."""

    cluster_size: Tensor  # [K], a moving average of how many vectors of a step have each code

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.embedding = Embedding(codes, width)
        self.register_buffer("cluster_size", torch.zeros(codes))

    def forward(self, z_BCgg: Tensor) -> Quantized:
        """Vectors [B, C, g, g] and their nearest codes."""
        vector = F.normalize(wide(z_BCgg), dim=1)
        rows_NC = as_rows(vector.detach())
        codebook = self.embedding.weight.to(rows_NC.dtype)
        token_N = nearest(rows_NC, codebook)
        code = codebook[token_N].view(len(vector), -1, codebook.shape[1]).transpose(1, 2).reshape(vector.shape)
        return Quantized(vector, code, token_N.view(len(vector), -1))

    def members(self, found: Quantized) -> tuple[Tensor, Tensor]:
        """(counts [K], sums [K, C]) of these vectors by code, float64: the order of ranks does not show in what they are rounded to."""
        return members(found.rows_NC.double(), found.token.flatten(), len(self.embedding.weight))

    @torch.no_grad()
    def begin(self, codebook_KC: Tensor, counts_K: Tensor) -> None:
        """Takes a first codebook, and how many vectors of a step each code has."""
        for table in (self.embedding.weight, self.embedding.embed_avg):
            table.copy_(codebook_KC)
        for use in (self.cluster_size, self.embedding.cluster_size):
            use.copy_(counts_K)
        self.embedding.initted.fill_(1)

    def dead(self, below: float) -> Tensor:
        """[K] bool, which codes are used less often than `below` the mean."""
        return self.cluster_size < below * self.cluster_size.mean()

    @torch.no_grad()
    def replace(self, vector_RC: Tensor, below: float) -> None:
        """Gives dead codes these vectors' places, and the mean use."""
        mean, dead = self.cluster_size.mean(), self.dead(below).nonzero()[: len(vector_RC), 0]
        self.embedding.weight[dead] = vector_RC[: len(dead)].to(self.embedding.weight.dtype)
        self.cluster_size[dead] = mean

    @torch.no_grad()
    def follow(self, counts_K: Tensor, sums_KC: Tensor, decay: float) -> None:
        """Moves the codebook by the members of all of a step's vectors."""
        self.embedding.weight.copy_(moved(self.embedding.weight, counts_K, sums_KC, decay))
        self.cluster_size.mul_(decay).add_(counts_K, alpha=1 - decay)


def head(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))


class VQKD(FamilyModel):
    """Encoder, codebook, decoder. Its teacher is no part of it: nothing of it is trained, sharded or written.

    The codebook moves once in an optimiser's step, by all vectors that any rank has seen in it.
    """

    family = FAMILY
    config: VQKDSettings
    teacher_mean: Tensor  # [T], of the first step, where features are standardised by it; zeros before
    teacher_std: Tensor

    def __init__(self, config: VQKDSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        dim, heads, patches = config.embed_dim, config.num_heads, config.patches
        rate = config.drop_path_rate
        self.encoder = Stack(3, config.patch_size, patches, dim, config.depth, heads, rate, self.recomputed)
        self.decoder = Stack(config.code_dim, 1, patches, dim, config.decoder_depth, heads, 0.0, self.recomputed)
        self.quantize = Quantizer(config.num_codes, config.code_dim)
        self.encode_task_layer = head(dim, config.code_dim)
        self.decode_task_layer = head(dim, config.teacher_dim)
        self.recomputed.tell(self)
        self.apply(partial(init_weights, std=config.init_std))
        for stack in (self.encoder, self.decoder):
            nn.init.trunc_normal_(stack.cls_token, std=config.init_std)
            nn.init.trunc_normal_(stack.pos_embed, std=config.init_std)
        if config.teacher_norm == "standard":
            self.register_buffer("teacher_mean", torch.zeros(config.teacher_dim))
            self.register_buffer("teacher_std", torch.ones(config.teacher_dim))
        self.teacher: Outside | None = None
        self.begun = False

    def open(self) -> None:
        if self.teacher is None:
            self.teacher = opened_teacher(self.config.teacher, self.config.side, self.config.teacher_dim)

    def open_as(self, other: VQKD) -> None:
        self.teacher = other.teacher

    def outside(self) -> dict[str, str]:
        return {"model.teacher": self.teacher.digest} if self.teacher and self.teacher.digest else {}

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (gives StepOutput); keys (vectors for the codebook's start); tokenize, nearness (for the evaluations)."""
        return {"step": self.step, "keys": self.keys, "tokenize": self.tokenize, "nearness": self.nearness}[call](batch)

    # ---- one training step ----

    def step(self, batch: Batch) -> StepOutput:
        """The weighted loss. batch: image [B, 3, S, S] uint8 (or float, already normalised), sample_id [B] int64; teacher_features [B, P, T]
        in place of the teacher's own."""
        out = StepOutput.empty()
        found = self.encode(self.pixels(batch))
        apart, wrong, _ = self.losses(found, self.features(batch))
        patches = wrong.detach().new_tensor(found.token.numel())
        apart = apart / self.config.code_dim
        loss = self.collector.global_mean(wrong + self.config.commitment * apart, patches)
        ratios = {"reconstruction": (wrong.detach(), patches), "commitment": (apart.detach(), patches)}
        self.record(out, "vqkd", (loss, ratios))
        if self.training:
            counts_K, sums_KC = self.quantize.members(found)
            out.seen.update(counts=counts_K, sums=sums_KC)
            if self.config.replace_below:
                place_N = places_of(batch["sample_id"], self.config.patches)
                vector, place = first_by_place(found.rows_NC, place_N, CANDIDATES)
                out.seen.update(vector=vector, place=place)
        return out._replace(loss=added(out.losses.values()))

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """What is to be told from the codes: the teacher's features [B, P, T], float32 at least."""
        features_BPT = wide(self.of_teacher(batch))
        return (
            features_BPT
            if self.config.teacher_norm == "none"
            else (features_BPT - self.teacher_mean) / self.teacher_std
        )

    def of_teacher(self, batch: Batch) -> Tensor:
        if "teacher_features" in batch:
            return batch["teacher_features"]
        self.open()
        return given(self.teacher, "teacher")(batch["image"], self.encoder.pos_embed.dtype)

    def settle(self, seen: Sequence[Mapping[str, Tensor]], taken: bool) -> dict[str, float]:
        """Moves the codebook by the vectors of all ranks; how many codes are used, and how evenly."""
        quantize, config = self.quantize, self.config
        counts_K, sums_KC = (self.collector.sum(added(part[name] for part in seen)) for name in ("counts", "sums"))
        if taken:
            quantize.follow(counts_K, sums_KC, config.decay)
            if config.replace_below and bool(quantize.dead(config.replace_below).any()):
                parts = [torch.cat([part[name] for part in seen]) for name in ("vector", "place")]
                mine = first_by_place(parts[0], parts[1], CANDIDATES)
                every = [self.collector.gather(part.contiguous()) for part in mine]
                quantize.replace(first_by_place(every[0], every[1], CANDIDATES)[0], config.replace_below)
        dead = quantize.dead(config.replace_below or DEAD)
        told = torch.stack(((counts_K > 0).double().mean(), perplexity(counts_K), dead.double().sum()))
        return dict(zip(("vqkd/code_use", "vqkd/perplexity", "vqkd/dead_codes"), told.tolist(), strict=True))

    # ---- the codebook's start ----

    @property
    def looks_ahead(self) -> bool:
        self.begun = self.begun or (bool(self.quantize.embedding.initted) and self.knows_teacher)
        return not self.begun

    @property
    def knows_teacher(self) -> bool:
        """Whether mean and variance of its features have been taken, where they are needed."""
        return self.config.teacher_norm == "none" or bool(self.teacher_mean.any())

    @torch.no_grad()
    def keys(self, batch: Batch) -> dict[str, Tensor]:
        """The vectors of a micro-batch [N, C], what they are put in order by [N], and how the teacher's features lie: their number, sums and sums
        of squares [2T + 1]."""
        vectors = self.encode(self.pixels(batch)).rows_NC
        feature_NT = self.of_teacher(batch).flatten(0, 1).double()
        count = feature_NT.new_tensor([len(feature_NT)])
        lie = torch.cat((count, feature_NT.sum(0), feature_NT.square().sum(0)))
        return {"vector": vectors, "place": places_of(batch["sample_id"], self.config.patches), "lie": lie}

    @torch.no_grad()
    def keys_of_step(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What a codebook and a teacher that are new begin with."""
        if not bool(self.quantize.embedding.initted):
            self.begin_codebook(parts)
        if not self.knows_teacher:
            lie = self.collector.sum(added(part["lie"] for part in parts))
            mean, square = (lie[1:] / lie[0]).chunk(2)
            variance = square - mean.square()
            self.teacher_mean.copy_(mean)
            # a component that hardly varies is rounding, which is not to be made as large as the others
            self.teacher_std.copy_(variance.clamp(min=LEAST_VARIANCE * float(variance.mean())).sqrt())
        return {}

    def begin_codebook(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """By k-means over the vectors of the first step on all ranks, or a part of them where they are many."""
        vector, place = (torch.cat([part[name] for part in parts]) for name in ("vector", "place"))
        most = VECTORS_A_CODE * self.config.num_codes
        ranks = self.collector.world_size
        mine = first_by_place(
            vector, place, most if ranks == 1 else 4 * (most // ranks + 256)
        )  # of the first, a rank has an even part
        every = [self.collector.gather(part.contiguous()) for part in mine]
        codebook_KC, counts_K = kmeans(first_by_place(every[0], every[1], most)[0], self.config.num_codes)
        self.collector.broadcast(codebook_KC)
        self.collector.broadcast(counts_K)
        self.quantize.begin(codebook_KC, counts_K)

    # ---- its parts ----

    def pixels(self, batch: Batch) -> Tensor:
        """uint8 image [B, 3, S, S] -> from -1 to 1, in the model's dtype."""
        return normalize(batch["image"], *PIXELS, self.encoder.pos_embed.dtype)

    def encode(self, image_BCHW: Tensor) -> Quantized:
        """Images from -1 to 1 -> their patches' vectors and codes."""
        z_BPC = self.encode_task_layer(self.encoder(image_BCHW))
        return self.quantize(z_BPC.transpose(1, 2).unflatten(2, (self.config.side, self.config.side)))

    def decode(self, code_BCgg: Tensor) -> Tensor:
        """Codes -> the teacher's features as they are told from them, [B, P, T]."""
        return self.decode_task_layer(self.decoder(code_BCgg.to(self.decoder.pos_embed.dtype)))

    def losses(self, found: Quantized, teacher_BPT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the commitment's sum over the elements, 1 - cosine with the teacher's features summed over the patches, reconstruction [B, P, T])."""
        told_BPT = self.decode(straight_through(found.vector, found.code))
        cosine = (unit(told_BPT) * unit(teacher_BPT)).sum(-1)
        return commitment(found.vector, found.code).sum(), (1 - cosine).sum(), told_BPT

    def tokenize(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> its visual tokens [B, P] int64, patches row by row."""
        return self.encode(self.pixels(batch)).token

    def nearness(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """image [B, 3, S, S] -> its visual tokens [B, P] int64, and the cosine of each patch's vector with its code [B, P]."""
        found = self.encode(self.pixels(batch))
        return found.token, (found.vector * found.code).sum(1).flatten(1)
