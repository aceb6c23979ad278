"""CoCa (arXiv:2205.01917): an image tower, a text decoder without and one with cross-attention to the image, trained by a
contrastive and a captioning loss in one pass. Parameter names and shapes are open_clip's.

Padding is not computed: a text's tokens are its words, with the released models' class mask one padding place, and the
class token; linear layers and norms see those of all texts as one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.cache import Cache
from vlmo_ds.blocks.fold import Fold
from vlmo_ds.blocks.kernels import LayerNorm
from vlmo_ds.blocks.layers import given, normalize, unit, wide
from vlmo_ds.blocks.position import begin_positions
from vlmo_ds.blocks.recompute import Recomputed
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.families.coca import FAMILY
from vlmo_ds.families.coca.block import AttentionalPooler, Block, Transformer, blocks_of
from vlmo_ds.families.coca.config import PIXELS, CoCaSettings
from vlmo_ds.families.step import Batch, FamilyModel, StepOutput, added
from vlmo_ds.objectives.captioning import chosen, learned_words, word_losses
from vlmo_ds.objectives.itc import keys_where, logit_parameters, loss_of

PADDING = 0  # the padding word's id: of its embedding alone, which words are valid is told by lengths
OF_CONTRAST = [  # what the contrastive loss alone reaches
    "logit_scale",
    "logit_bias",
    "visual.proj",
    "visual.attn_pool_contrastive.*",
    "text.cls_emb",
    "text.ln_final.*",
    "text.text_projection",
]


class VisionTransformer(nn.Module):
    """The image tower, with poolers for the contrastive feature and the caption tokens."""

    def __init__(self, config: CoCaSettings, recomputed: Recomputed):
        super().__init__()
        width, dim = config.vision_width, config.embed_dim
        self.image_size, self.pool = config.image_size, config.attentional_pool
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.patches + 1, width))
        self.ln_pre = LayerNorm(width)
        heads, ratio = width // config.vision_head_width, config.vision_mlp_ratio
        self.transformer = Transformer(width, config.vision_layers, heads, ratio, recomputed)
        if self.pool != "none":
            self.attn_pool = AttentionalPooler(dim, width, config.pooler_heads, config.pooler_queries)
        if self.pool in ("cascade", "parallel"):
            context = dim if self.pool == "cascade" else width
            self.attn_pool_contrastive = AttentionalPooler(dim, context, config.pooler_heads, 1)
        self.ln_post = LayerNorm(config.token_width)
        self.proj = nn.Parameter(torch.empty(config.token_width, dim))

    def forward(self, image_BCHW: Tensor, feature: bool = True) -> tuple[Tensor | None, Tensor]:
        """Normalised images [B, 3, S, S] -> (feature [B, E] before its normalisation, None where it is not asked for; caption
        tokens [B, S, D])."""
        x_BLD = self.encoded(image_BCHW)
        tokens = self.ln_post(x_BLD if self.pool == "none" else self.attn_pool(x_BLD))
        if self.pool in ("none", "single"):
            pooled, tokens = tokens[:, 0], tokens[:, 1:]
        if not feature:
            return None, tokens
        if self.pool in ("cascade", "parallel"):
            pooled = self.ln_post(self.attn_pool_contrastive(tokens if self.pool == "cascade" else x_BLD))[:, 0]
        return pooled @ self.proj, tokens

    def encoded(self, image_BCHW: Tensor) -> Tensor:
        """Normalised images -> [B, 1 + P, W] of the last block, before norm and pooling."""
        if image_BCHW.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(str(n) for n in image_BCHW.shape[-2:])
            raise ValueError(f"image is {found} pixels, the model takes {self.image_size}x{self.image_size}")
        x_BLD = self.conv1(image_BCHW).flatten(2).transpose(1, 2)
        x_BLD = torch.cat((self.class_embedding.expand(len(x_BLD), 1, -1), x_BLD), dim=1) + self.positional_embedding
        return self.transformer(self.ln_pre(x_BLD))


class EncodedText(NamedTuple):
    """feature [B, E] before its normalisation, None where it was not asked for; tokens [N, D] of the words, folded as `fold`
    says."""

    feature: Tensor | None
    tokens_ND: Tensor
    fold: Fold


class TextTransformer(nn.Module):
    """The text decoder without cross-attention; a learnt class token after the text gives its feature."""

    def __init__(self, config: CoCaSettings, recomputed: Recomputed):
        super().__init__()
        width = config.text_width
        self.context_length, self.legacy = config.max_text_len, config.class_mask == "legacy"
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.cls_emb = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.max_text_len + 1, width))
        self.transformer = Transformer(width, config.text_layers, config.text_heads, config.mlp_ratio, recomputed)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, ids_BL: Tensor, lengths_B: Tensor, feature: bool = True) -> EncodedText:
        """ids_BL int64, padded; lengths_B: words of each, at most context_length; feature: whether it is asked for.

        The class token has the last row of the positions, whatever the text's length. With the released models' mask it sees
        the words and the place after them, which holds the padding word, and itself only where the text leaves no place.
        """
        if ids_BL.shape[1] > self.context_length:
            raise ValueError(f"text of {ids_BL.shape[1]} tokens, the model takes at most {self.context_length}")
        if not feature:
            words = Fold(lengths_B, ids_BL.shape[1])
            positions = words.folded(torch.arange(words.length, device=ids_BL.device).expand_as(ids_BL))
            x_ND = self.token_embedding(words.folded(ids_BL)) + self.positional_embedding[positions]
            return EncodedText(None, self.transformer(x_ND, words.causal[None, None], words), words)
        extra_B = (lengths_B < self.context_length).long() if self.legacy else torch.zeros_like(lengths_B)
        last_B = lengths_B + extra_B  # where the class token stands
        fold = Fold(last_B + 1, int(last_B.max()) + 1)
        column_L = torch.arange(fold.length, device=ids_BL.device)
        ids = F.pad(ids_BL, (0, fold.length - ids_BL.shape[1]))[:, : fold.length]
        ids = torch.where(column_L[None] < lengths_B[:, None], ids, PADDING)
        at_class_BL = column_L[None] == last_B[:, None]
        at_class_N = fold.folded(at_class_BL)
        x_ND = self.token_embedding(fold.folded(ids))
        x_ND = torch.where(at_class_N[:, None], self.cls_emb, x_ND)
        positions_BL = torch.where(at_class_BL, self.context_length, column_L[None])
        x_ND = x_ND + self.positional_embedding[fold.folded(positions_BL)]
        # the class token does not see itself where a padding place takes its turn
        blind_BL = at_class_BL & (extra_B == 1)[:, None]
        mask_BLL = fold.causal[None] & ~(blind_BL[:, :, None] & blind_BL[:, None, :])
        x_ND = self.transformer(x_ND, mask_BLL[:, None], fold)
        words = Fold(lengths_B, fold.length)
        pooled = self.ln_final(x_ND[at_class_N]) @ self.text_projection
        return EncodedText(pooled, words.folded(fold.padded(x_ND)), words)

    def step(self, ids_RL: Tensor, first: int, cache: Cache) -> Tensor:
        """The L newest words of R texts that have `first` words already -> [R, L, D]."""
        places = slice(first, first + ids_RL.shape[1])
        x_RLD = self.token_embedding(ids_RL) + self.positional_embedding[places]
        for layer, block in enumerate(blocks_of(self.transformer.resblocks)):
            x_RLD = block.step(x_RLD, cache, layer)
        return x_RLD


class MultimodalTransformer(nn.Module):
    """The text decoder with cross-attention to the caption tokens of the image."""

    def __init__(self, config: CoCaSettings, recomputed: Recomputed):
        super().__init__()
        width, heads, ratio = config.text_width, config.decoder_heads, config.mlp_ratio
        self.resblocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(config.decoder_layers))
        self.cross_attn = nn.ModuleList(Block(width, heads, ratio, cross=True) for _ in range(config.decoder_layers))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.vocab_size))
        self.recomputed = recomputed

    def forward(
        self, x_ND: Tensor, fold: Fold, image_BSD: Tensor, labels_N: Tensor, learned_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Folded tokens of the text tower, caption tokens of their images, the words that follow, whose loss is taken (as
        learned_words) -> as word_losses."""
        hidden_ND, labels_N = chosen(learned_N, self.hidden(x_ND, fold, image_BSD), labels_N)
        return word_losses(hidden_ND, self.text_projection, labels_N)

    def hidden(self, x_ND: Tensor, fold: Fold, image_BSD: Tensor) -> Tensor:
        """As forward's first three -> [N, D] after the final norm."""
        for i, (block, cross) in enumerate(zip(self.resblocks, self.cross_attn, strict=True)):
            x_ND = self.recomputed(block, i, x_ND, None, fold.causal, fold)
            x_ND = self.recomputed(cross, i, x_ND, image_BSD, None, fold)
        return self.ln_final(x_ND)

    def memory(self, image_BSD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the caption tokens, of every layer [B, H, S, D/H]."""
        return [cross.attn.keys_and_values(cross.ln_1_kv(image_BSD)) for cross in blocks_of(self.cross_attn)]

    def step(self, x_RLD: Tensor, memory: Sequence[tuple[Tensor, Tensor]], cache: Cache, first_layer: int) -> Tensor:
        """The text tower's output for the newest words -> logits [R, V] of the word after them, in float32 at least."""
        pairs = zip(blocks_of(self.resblocks), blocks_of(self.cross_attn), strict=True)
        for i, (block, cross) in enumerate(pairs):
            x_RLD = cross.look(block.step(x_RLD, cache, first_layer + i), *memory[i])
        return wide(self.ln_final(x_RLD[:, -1]) @ self.text_projection)


class CoCa(FamilyModel):
    """CoCa with what its tasks need. tasks: task name -> loss weight, of itc and caption."""

    family = FAMILY
    config: CoCaSettings

    def __init__(self, config: CoCaSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        self.visual = VisionTransformer(config, self.recomputed)
        self.text = TextTransformer(config, self.recomputed)
        self.text_decoder = MultimodalTransformer(config, self.recomputed)
        self.recomputed.tell(self)
        self.logit_scale, self.logit_bias = logit_parameters(config.itc_kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's scheme (arXiv:2103.00020, section 2.4) in all three towers, vocabulary head and poolers included."""
        config = self.config
        nn.init.normal_(self.visual.class_embedding, std=config.vision_width**-0.5)
        std = config.position_std or config.vision_width**-0.5
        begin_positions(self.visual.positional_embedding, config.position_init, std)
        nn.init.normal_(self.visual.proj, std=config.token_width**-0.5)
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text.positional_embedding, std=0.01)
        nn.init.normal_(self.text.cls_emb, std=0.01)
        width = config.text_width
        nn.init.normal_(self.text.text_projection, std=width**-0.5)
        nn.init.normal_(self.text_decoder.text_projection, std=width**-0.5)
        towers = (
            (self.visual, config.vision_layers),
            (self.text, config.text_layers),
            (self.text_decoder, 2 * config.decoder_layers),
        )
        for tower, depth in towers:
            for module in tower.modules():
                if isinstance(module, Block):
                    module.reset_parameters(depth)
                elif isinstance(module, AttentionalPooler):
                    module.reset_parameters()

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (all tasks, gives StepOutput); contrast_features and cached_step (of a gradient-cached step);
        encode_patches, encode_image, encode_text, caption_image, caption_step (for evaluation and generation)."""
        return {
            "step": self.step,
            "contrast_features": self.contrast_features,
            "cached_step": self.cached_step,
            "encode_patches": self.encode_patches,
            "encode_image": self.encode_image,
            "encode_text": self.encode_text,
            "caption_image": self.caption_image,
            "caption_step": self.caption_step,
        }[call](batch)

    # ---- one training step ----

    def step(self, batch: Batch) -> StepOutput:
        """The weighted losses of all tasks. batch: image [B, 3, S, S] uint8 (or float, normalised), text_ids, text_masks [B, L];
        where captions begin with a prompt, prompt_words [B] int64: its words, the start included."""
        features, out = self.cached_step(batch)
        if "itc" in self.tasks:
            self.add_contrast(out, features)
        return out._replace(loss=added(out.losses.values()))

    def cached_step(self, batch: Batch) -> tuple[dict[str, Tensor], StepOutput]:
        """(what add_contrast needs, the other tasks' losses), from one pass through the towers. batch may hold
        words_count: the words whose loss is taken in all parts of this rank's batch, of which this is one."""
        out = StepOutput.empty()
        contrast = "itc" in self.tasks
        image, tokens = self.visual(self.pixels(batch), feature=contrast)
        lengths_B = batch["text_masks"].sum(1)
        text = self.text(batch["text_ids"], lengths_B, feature=contrast)
        if "caption" in self.tasks:
            x_ND, fold, labels_N = next_words(batch["text_ids"], lengths_B, text)
            learned_N = learned_words(lengths_B, batch["text_ids"].shape[1], batch.get("prompt_words"))
            total, right = self.text_decoder(x_ND, fold, tokens, labels_N, learned_N)
            count = total.detach().new_tensor(len(chosen(learned_N, labels_N)[0]))
            loss = self.collector.global_mean(total, batch.get("words_count", count))
            self.record(out, "caption", (loss, {"accuracy": (right, count)}))
            out = out._replace(loss=out.losses["caption"])
        features = self.contrast_of(image, given(text.feature, "feature"), batch) if contrast else {}
        return features, out

    def contrast_features(self, batch: Batch) -> dict[str, Tensor]:
        """What add_contrast needs: features image, text [B, E], scale and bias of logits; and words_count, the words whose loss is taken."""
        image, _ = self.visual(self.pixels(batch))
        lengths_B = batch["text_masks"].sum(1)
        feature = given(self.text(batch["text_ids"], lengths_B).feature, "feature")
        learned_N = learned_words(lengths_B, batch["text_ids"].shape[1], batch.get("prompt_words"))
        words = (lengths_B - 1).sum() if learned_N is None else learned_N.sum()
        return {**self.contrast_of(image, feature, batch), "words_count": words}

    def contrast_of(self, image: Tensor, text: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Features [B, E] before their normalisation -> what add_contrast needs."""
        terms = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        found = {name: term.clone() for name, term in terms.items() if term is not None}
        return {"image": unit(image), "text": unit(text), **found, **keys_where(self.config.positives, batch)}

    def add_contrast(self, out: StepOutput, found: Mapping[str, Tensor]) -> None:
        """Records the contrastive loss over the global batch, of what contrast_features gives; reads no parameter."""
        loss, ratios, _, values = loss_of(found, self.collector)
        out.values.update(values)
        self.record(out, "itc", (loss, ratios))

    def idle(self) -> list[str]:
        """Patterns of what none of the tasks reaches."""
        if "caption" not in self.tasks:
            return ["text_decoder.*", *(["visual.attn_pool.*"] if self.config.attentional_pool == "parallel" else [])]
        return [] if "itc" in self.tasks else OF_CONTRAST

    # ---- evaluation ----

    def encode_patches(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> its patches' encodings [B, P, W], row by row; where a pooler follows, before its norm."""
        tower = self.visual
        x_BLD = tower.encoded(self.pixels(batch))[:, 1:]
        return tower.ln_post(x_BLD) if tower.pool == "none" else x_BLD

    def encode_image(self, batch: Batch) -> dict[str, Tensor]:
        """image [B, 3, S, S] -> contrastive features image [B, E], of unit length."""
        return {"image": unit(self.visual(self.pixels(batch))[0])}

    def encode_text(self, batch: Batch) -> dict[str, Tensor]:
        """text_ids, text_masks [B, L] -> contrastive features text [B, E], of unit length."""
        text = self.text(batch["text_ids"], batch["text_masks"].sum(1))
        return {"text": unit(given(text.feature, "feature"))}

    def caption_image(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """image [B, 3, S, S] -> what caption_step needs of it, computed once: keys and values [B, H, S, D/H] of every layer."""
        return self.text_decoder.memory(self.visual(self.pixels(batch), feature=False)[1])

    def caption_step(self, batch: Mapping[str, Any]) -> Tensor:
        """text_ids [R, L] int64, the newest words of R = n * B texts, n for each of B images; first: words before them;
        memory: of caption_image; cache: Cache -> logits [R, V] of the word after the newest."""
        x_RLD = self.text.step(batch["text_ids"], batch["first"], batch["cache"])
        return self.text_decoder.step(x_RLD, batch["memory"], batch["cache"], self.config.text_layers)

    @property
    def cached_layers(self) -> int:
        """Layers that have a cache in caption_step."""
        return self.config.text_layers + self.config.decoder_layers

    def pixels(self, batch: Batch) -> Tensor:
        """uint8 image [B, 3, S, S] -> normalised, in the model's dtype."""
        return normalize(batch["image"], *PIXELS, self.logit_scale.dtype)

    def contrast_scale(self) -> Tensor:
        return self.logit_scale.detach().float().exp()


def next_words(ids_BL: Tensor, lengths_B: Tensor, text: EncodedText) -> tuple[Tensor, Fold, Tensor]:
    """(tokens [N, D] of every word but each text's last, their fold, the words that follow them [N])."""
    fold = Fold(lengths_B - 1, text.fold.length)
    following = F.pad(ids_BL[:, 1:], (0, fold.length - ids_BL.shape[1] + 1))
    return fold.folded(text.fold.padded(text.tokens_ND)), fold, fold.folded(following)
