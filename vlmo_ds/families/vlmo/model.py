"""VLMo: the MultiWayTransformer, its embeddings and its heads; one training step as the engine runs it.

Everything goes through `VLMo.forward`, because under ZeRO-3 the parameters that VLMo holds itself (the relative
position table, the logit scales) are there only inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.blocks.fold import sent
from vlmo_ds.blocks.heads import (
    ITCHead,
    ITMHead,
    MIMDecoder,
    MIMHead,
    MLMHead,
    PatchAggregation,
    Pooler,
    TextEmbeddings,
    classifier,
)
from vlmo_ds.blocks.layers import given, init_weights, normalize
from vlmo_ds.blocks.position import num_distances
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.distributed.rows import Contrasted, Draw
from vlmo_ds.families.outside import TokensOfImages
from vlmo_ds.families.step import Batch, StepOutput, added
from vlmo_ds.families.vlmo import FAMILY
from vlmo_ds.families.vlmo.config import PIXELS, VLMoSettings
from vlmo_ds.families.vlmo.multiway import Encoded, MultiWayTransformer, Stream
from vlmo_ds.objectives.classification import classification_loss
from vlmo_ds.objectives.itc import keys_where, logit_parameters, loss_of
from vlmo_ds.objectives.itm import Negatives, draws_of, itm_loss
from vlmo_ds.objectives.mim import NormalizedPixels, mim_loss
from vlmo_ds.objectives.mlm import mlm_loss
from vlmo_ds.objectives.vqa import vqa_loss


class VLMo(TokensOfImages):
    """VLMo (arXiv:2111.02358) with the heads that its tasks need.

    tasks: task name -> loss weight. Names: mim, textmlm, mlm, itc, itm; irtr, vqa, nlvr2 go alone.
    Parameter names and shapes are those of the official checkpoints.
    """

    family = FAMILY
    config: VLMoSettings

    def __init__(self, config: VLMoSettings, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__(config, tasks, collector)
        dim = config.embed_dim
        self.transformer = MultiWayTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            vlffn_start_layer_index=config.vlffn_start_layer_index,
            use_abs_pos_emb=config.use_abs_pos_emb,
            layer_scale_init_values=config.layer_scale_init_values,
            max_text_len_of_initckpt=config.max_text_len_of_initckpt,
            drop_path_rate=config.drop_path_rate,
            with_mask_token="mim" in tasks and not config.mim_visible_only,
            attention=config.attention,
            recomputed=self.recomputed,
        )
        self.text_embeddings = TextEmbeddings(
            config.vocab_size,
            dim,
            config.max_text_len,
            not config.need_relative_position_embed,
            config.text_dropout_rate,
        )
        self.token_type_embeddings = nn.Embedding(3 if "nlvr2" in tasks else 2, dim)
        self.pooler = Pooler(dim)
        if config.need_relative_position_embed:
            rows = num_distances(config.image_size // config.patch_size, config.max_text_len_of_initckpt)
            table = nn.Parameter(torch.zeros(rows, config.num_heads * config.depth))
            self.relative_position_bias_table: nn.Parameter | None = table
        else:
            self.relative_position_bias_table = None
        if "mim" in tasks:
            self.mim_target = NormalizedPixels(config.patch_size) if config.mim_target == "pixels" else None
            wanted = config.num_visual_tokens if self.mim_target is None else self.mim_target.dim
            hidden, window = int(dim * config.mlp_ratio), config.image_size // config.patch_size
            self.mim_score = (
                MIMDecoder(dim, config.num_heads, hidden, window, wanted)
                if config.mim_visible_only
                else MIMHead(dim, wanted)
            )
            if config.mim_early_layer:
                self.mim_aggregation = PatchAggregation(
                    dim, config.num_heads, config.mim_head_layers, config.layer_scale_init_values, config.drop_path_rate
                )
        if "mlm" in tasks or "textmlm" in tasks:
            self.mlm_score = MLMHead(dim, config.vocab_size)
        if "itm" in tasks:
            self.itm_score = ITMHead(dim)
        if {"itc", "irtr"} & tasks.keys():
            self.itc_text_proj, self.itc_image_proj = ITCHead(dim), ITCHead(dim)
            self.logit_scale, self.logit_bias = logit_parameters(config.itc_kind)
        if "itc" in tasks:
            self.itc_vl_text_proj, self.itc_vl_image_proj = ITCHead(dim), ITCHead(dim)
            self.logit_vl_scale, self.logit_vl_bias = logit_parameters(config.itc_kind)
        if "vqa" in tasks:
            self.vqa_classifier = classifier(dim, 2 * dim, config.vqav2_label_size)
        if "nlvr2" in tasks:
            self.nlvr2_classifier = classifier(2 * dim, 2 * dim, 2)
        self.apply(partial(init_weights, std=config.init_std))
        for name, token in self.named_parameters():
            if name.endswith(("cls_token", "mask_token", "pos_embed")):
                nn.init.trunc_normal_(token, std=config.init_std)

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (all tasks, gives StepOutput); contrast_features and cached_step (of a gradient-cached step);
        encode_patches, encode_image, encode_text, match, answer, compare (for evaluation)."""
        return {
            "step": self.step,
            "contrast_features": self.contrast_features,
            "cached_step": lambda batch: (self.contrast_features(batch), StepOutput.empty()),
            "encode_patches": self.encode_patches,
            "encode_image": self.encode_image,
            "encode_text": self.encode_text,
            "match": self.match,
            "answer": self.answer,
            "compare": self.compare,
        }[call](batch)

    # ---- one training step ----

    def step(self, batch: Batch) -> StepOutput:
        """The weighted losses of all tasks.

        batch: image [B, 3, S, S] uint8 (or float, already normalised), text_ids, text_masks, text_ids_mlm,
        text_labels_mlm [B, L] int64, image_id, sample_id [B] int64, image_mask [B, P] bool, visual_tokens [B, P] int64 (mim),
        negative_seed 0-d int64 (itm), step_seed likewise (patch_dropout), vqa_targets [B, A] float, image_0, image_1 as image and answers [B] int64
        (nlvr2): as far as the tasks need them.
        """
        out = StepOutput.empty()
        if "irtr" in self.tasks:
            self.add_contrast(out, self.contrast_features(batch))
        elif "vqa" in self.tasks:
            self.record(out, "vqa", vqa_loss(self.answer(batch), batch["vqa_targets"], self.collector))
        elif "nlvr2" in self.tasks:
            self.record(out, "nlvr2", classification_loss(self.compare(batch), batch["answers"], self.collector))
        else:
            self.pretraining_step(batch, out)
        return out._replace(loss=added(out.losses.values()))

    def pretraining_step(self, batch: Batch, out: StepOutput) -> None:
        """Two walks of the block stack: wave 1 encodes all that needs no mined negatives, wave 2 the mined pairs."""
        tasks, streams = self.tasks, {}
        texts: dict[str, Tensor] = {}
        if "mlm" in tasks or "textmlm" in tasks:
            texts["masked"] = batch["text_ids_mlm"]
        if "itc" in tasks or "itm" in tasks:
            texts["clean"] = batch["text_ids"]
        images = normalized(batch["image"], self.transformer.cls_token.dtype) if self.needs_image else None
        masked_BP = batch["image_mask"] if "mim" in tasks else None
        unseen_BP = masked_BP if self.config.mim_visible_only else None
        types = self.token_types()
        text = self.embed_texts(texts, types)
        mask = batch.get("text_masks")
        rows = torch.arange(len(images), device=images.device) if images is not None else None
        if "mlm" in tasks:
            streams["mlm"] = Stream(text["masked"], mask, rows, reads="text")
        if "itm" in tasks:
            streams["itm"] = Stream(text["clean"], mask, rows, reads="class")
        if "textmlm" in tasks:
            streams["textmlm"] = Stream(text["masked"], mask)
        if "itc" in tasks:
            streams["text"] = Stream(text["clean"], mask, vl_twin=True, reads="class")
            seen = self.patches_seen(batch)
            streams["image"] = Stream(image_rows_B=rows, image_tokens_K=seen, vl_twin=True, reads="class")
        if "mim" in tasks:
            seen_BL = None if unseen_BP is None else F.pad(~unseen_BP, (1, 0), value=True)
            streams["mim"] = Stream(image_rows_B=rows, seen_BL=seen_BL, early=self.config.mim_early_layer)
        wave1 = self.encode(streams, images, types[1], masked_BP if unseen_BP is None else None)

        if masked_BP is not None:
            self.record(out, "mim", self.mim(batch, wave1["mim"], given(images, "image"), masked_BP))
        if "textmlm" in tasks:
            labels = batch["text_labels_mlm"]
            self.record(out, "textmlm", mlm_loss(wave1["textmlm"].tokens_BLD, labels, self.mlm_score, self.collector))
        if "mlm" in tasks:
            labels = batch["text_labels_mlm"]
            self.record(out, "mlm", mlm_loss(wave1["mlm"].tokens_BLD, labels, self.mlm_score, self.collector))
        if "itc" in tasks:
            draws: tuple[Draw, Draw] | None = None
            found = (
                self.itc_features(wave1["image"], wave1["text"])
                | self.logit_terms()
                | keys_where(self.config.positives, batch)
            )
            if "itm" in tasks:
                ids, seed = (batch["sample_id"], batch["image_id"]), int(batch["negative_seed"])
                draws = draws_of(*ids, seed, self.collector, found.get("keys"))
            contrasted = self.add_contrast(out, found, draws)
        if "itm" in tasks:
            negatives = self.negatives(batch, contrasted)
            mined = self.mined_pairs(batch, given(images, "image"), text["clean"], types, negatives)
            cls = torch.cat((wave1["itm"].tokens_BLD[:, 0], mined))
            self.record(out, "itm", itm_loss(self.itm_score(self.pooler(cls)), self.collector))

    # ---- masked patches ----

    def mim(
        self, batch: Batch, encoded: Encoded, images: Tensor, masked_BP: Tensor
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Loss at the masked patches, and with visual tokens how many are right."""
        if self.mim_target is not None:
            predicted = self.mim_score(encoded.tokens_BLD, masked_BP)
            return mim_loss(predicted, images, masked_BP, self.mim_target, self.collector)
        token_M = self.visual_tokens(batch)[masked_BP]
        total, right = self.mim_score(encoded.tokens_BLD, masked_BP, token_M)
        count = total.detach().new_tensor(len(token_M))
        ratios = {"accuracy": (right, count)}
        if encoded.early_BLD is not None:
            told, right = self.mim_score(self.aggregated(encoded.early_BLD), masked_BP, token_M)
            total, ratios = total + told, ratios | {"early_accuracy": (right, count)}
        return self.collector.global_mean(total, count), ratios

    def aggregated(self, early_BLD: Tensor) -> Tensor:
        """Class token of the last block and patches of an early one -> what the patch aggregation makes of them, after the final norm."""
        rows = torch.arange(len(early_BLD), device=early_BLD.device)
        (biases,) = self.transformer.biases([Stream(image_rows_B=rows)], self.relative_position_bias_table)
        return self.transformer.norm(self.mim_aggregation(early_BLD, biases[-1]))

    @property
    def predicts_tokens(self) -> bool:
        return "mim" in self.tasks and self.mim_target is None

    # ---- image-text contrast ----

    @property
    def has_twin(self) -> bool:
        """Whether contrast is also taken through the VL experts (in pretraining; not in fine-tuning for retrieval)."""
        return "itc" in self.tasks

    def patches_seen(self, batch: Batch) -> Tensor | None:
        """The tokens of images that contrast sees in a step of training (patch_dropout), the class token's 0 first, int64; None: all. The
        same for all images of a step, on every rank, whose positions' biases are one table then."""
        patches, count = self.config.patches, self.config.patches_of_contrast
        if count == patches or not self.training:
            return None
        generator = torch.Generator().manual_seed(int(batch["step_seed"]))
        chosen = torch.randperm(patches, generator=generator, device="cpu")[:count].sort().values
        return sent(F.pad(1 + chosen, (1, 0)), self.transformer.cls_token.device)

    def logit_terms(self) -> dict[str, Tensor]:
        """What logits are multiplied with, as a logarithm, and with the sigmoid loss what is added to them."""
        names = ["logit_scale", "logit_bias", *(["logit_vl_scale", "logit_vl_bias"] if self.has_twin else [])]
        return {name: term for name in names if (term := getattr(self, name)) is not None}

    def contrast_features(self, batch: Batch) -> dict[str, Tensor]:
        """image, text_ids, text_masks -> what add_contrast needs, from one walk: features [B, D], logit scales."""
        images = normalized(batch["image"], self.transformer.cls_token.dtype)
        types = self.token_types()
        text = self.embed_texts({"text": batch["text_ids"]}, types)["text"]
        streams = {
            "text": Stream(text, batch["text_masks"], vl_twin=self.has_twin, reads="class"),
            "image": Stream(
                image_rows_B=torch.arange(len(images), device=images.device),
                image_tokens_K=self.patches_seen(batch),
                vl_twin=self.has_twin,
                reads="class",
            ),
        }
        encoded = self.encode(streams, images, types[1])
        terms = {name: term.clone() for name, term in self.logit_terms().items()}
        return self.itc_features(encoded["image"], encoded["text"]) | terms | keys_where(self.config.positives, batch)

    def add_contrast(
        self, out: StepOutput, found: Mapping[str, Tensor], draws: tuple[Draw, Draw] | None = None
    ) -> Contrasted:
        """Records the contrastive loss over the global batch, of what contrast_features gives; reads no parameter. draws: of hard
        negatives, which come with the result."""

        loss, ratios, contrasted, values = loss_of(found, self.collector, draws=draws)
        if self.has_twin:
            vl_loss, vl_ratios, _, vl_values = loss_of(found, self.collector, "vl_")
            values |= vl_values
            loss = (loss + vl_loss) / 2
            ratios |= {f"vl_{name}": ratio for name, ratio in vl_ratios.items()}
        out.values.update(values)
        self.record(out, "itc" if self.has_twin else "irtr", (loss, ratios))
        return contrasted

    def negatives(self, batch: Batch, drawn: Contrasted) -> Negatives:
        if "negative_image_index" in batch:  # recorded negatives, for parity checks
            return Negatives(batch["negative_image_index"], batch["negative_text_index"])
        return Negatives(given(drawn.image_B, "image_B"), given(drawn.text_B, "text_B"))

    @property
    def needs_image(self) -> bool:
        return not self.tasks.keys() <= {"textmlm"}

    def mined_pairs(
        self, batch: Batch, images: Tensor, text_BLD: Tensor, types_2D: Tensor, negatives: Negatives
    ) -> Tensor:
        """Wave 2: class tokens of (text, wrong image), then of (wrong text, image), [2B, D]."""
        length = self.config.max_text_len  # ranks trim their text differently; rows that travel have one shape
        ids, masks = (F.pad(batch[k], (0, length - batch[k].shape[1])) for k in ("text_ids", "text_masks"))
        wrong_image, wrong_ids, wrong_masks = self.collector.exchange(
            [batch["image"], ids, masks], [negatives.image_B, negatives.text_B, negatives.text_B]
        )
        keep = max(int(wrong_masks.sum(1).max()), text_BLD.shape[1])
        mask = torch.cat((masks, wrong_masks))[:, :keep]
        wrong_text_BLD = self.embed_texts({"wrong": wrong_ids[:, :keep]}, types_2D)["wrong"]
        padded_text_BLD = F.pad(text_BLD, (0, 0, 0, keep - text_BLD.shape[1]))
        pairs = Stream(
            torch.cat((padded_text_BLD, wrong_text_BLD)),
            mask,
            torch.arange(2 * len(ids), device=mask.device),
            reads="class",
        )
        pixels = torch.cat((normalized(wrong_image, images.dtype), images))
        return self.encode({"pairs": pairs}, pixels, types_2D[1])["pairs"].tokens_BLD[:, 0]

    # ---- encodings ----

    def encode(
        self,
        streams: Mapping[str, Stream],
        images: Tensor | None,
        image_type: Tensor,
        image_mask: Tensor | None = None,
    ) -> dict[str, Encoded]:
        """Walks the block stack once for all streams.

        images: normalised, what the streams' image_rows_B point to; image_type: their token type's embedding, [D] or
        [B, 1, D].
        """
        encoded = self.transformer(
            list(streams.values()), self.relative_position_bias_table, images, image_type, image_mask
        )
        return dict(zip(streams, encoded, strict=True))

    def token_types(self) -> Tensor:
        """The embeddings that mark text (0), image (1) and second image (2) tokens, [2 or 3, D]: read once a step."""
        types = self.token_type_embeddings
        return types(torch.arange(types.num_embeddings, device=types.weight.device))

    def embed_texts(self, texts: Mapping[str, Tensor], types_2D: Tensor) -> dict[str, Tensor]:
        """Word (and position) embeddings plus VLMo's token type 0, one call for all texts of equal length."""
        if not texts:
            return {}
        embedded = self.text_embeddings(torch.cat(list(texts.values()))) + types_2D[0]
        return dict(zip(texts, embedded.split([len(t) for t in texts.values()]), strict=True))

    def itc_features(self, image: Encoded | None, text: Encoded | None) -> dict[str, Tensor]:
        """Unit-length contrastive features of the class tokens, and of their vl twins."""
        features = {}
        if image is not None:
            features["image"] = self.itc_image_proj(image.tokens_BLD[:, 0])
            if self.has_twin:
                features["vl_image"] = self.itc_vl_image_proj(given(image.twin_BLD, "twin_BLD")[:, 0])
        if text is not None:
            features["text"] = self.itc_text_proj(text.tokens_BLD[:, 0])
            if self.has_twin:
                features["vl_text"] = self.itc_vl_text_proj(given(text.twin_BLD, "twin_BLD")[:, 0])
        return features

    # ---- evaluation, and the steps of fine-tuning ----

    def encode_patches(self, batch: Batch) -> Tensor:
        """image [B, 3, S, S] -> its patches' encodings [B, P, D], row by row."""
        images = normalized(batch["image"], self.transformer.cls_token.dtype)
        stream = Stream(image_rows_B=torch.arange(len(images), device=images.device))
        return self.encode({"image": stream}, images, self.token_types()[1])["image"].tokens_BLD[:, 1:]

    def encode_image(self, batch: Batch) -> dict[str, Tensor]:
        """image [B, 3, S, S] -> contrastive features image (and vl_image), [B, D]."""
        images = normalized(batch["image"], self.transformer.cls_token.dtype)
        stream = Stream(None, None, torch.arange(len(images), device=images.device), self.has_twin, "class")
        return self.itc_features(self.encode({"image": stream}, images, self.token_types()[1])["image"], None)

    def encode_text(self, batch: Batch) -> dict[str, Tensor]:
        """text_ids, text_masks [B, L] -> contrastive features text (and vl_text), [B, D]."""
        types = self.token_types()
        text = self.embed_texts({"text": batch["text_ids"]}, types)["text"]
        stream = Stream(text, batch["text_masks"], vl_twin=self.has_twin, reads="class")
        return self.itc_features(None, self.encode({"text": stream}, None, types[1])["text"])

    def match(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B pairs -> [B] log-odds that they match."""
        logits = self.itm_score(self.pooled_pairs(batch["image"], batch, self.token_types())).float()
        return logits[:, 1] - logits[:, 0]

    def answer(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B questions -> [B, vqav2_label_size] logits of the answers. With question_image [B] int64 in
        the batch, images are fewer, and each question is about that one."""
        asked_B = batch.get("question_image")
        return self.vqa_classifier(self.pooled_pairs(batch["image"], batch, self.token_types(), rows=asked_B))

    def compare(self, batch: Batch) -> Tensor:
        """image_0, image_1, text_ids, text_masks of B sentences about two images -> [B, 2] logits, index 1 = true."""
        types = self.token_types()
        both = torch.cat((batch["image_0"], batch["image_1"]))
        image_type = types[1:].repeat_interleave(len(batch["image_0"]), dim=0)[:, None]
        first, second = self.pooled_pairs(both, batch, types, image_type).chunk(2)
        return self.nlvr2_classifier(torch.cat((first, second), dim=1))

    def pooled_pairs(
        self, images: Tensor, batch: Batch, types: Tensor, image_type: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Pooled class tokens of texts with images, [P, D]; rows: the image of each text, None: all in order, the texts repeated where
        there are more images."""
        images = normalized(images, self.transformer.cls_token.dtype)
        text = self.embed_texts({"text": batch["text_ids"]}, types)["text"]
        if rows is None:
            rows = torch.arange(len(images), device=images.device)
        times = len(rows) // len(text)
        stream = Stream(text.repeat(times, 1, 1), batch["text_masks"].repeat(times, 1), rows, reads="class")
        encoded = self.encode({"pair": stream}, images, types[1] if image_type is None else image_type)
        return self.pooler(encoded["pair"].tokens_BLD[:, 0])

    def contrast_scale(self) -> Tensor:
        return self.logit_scale.detach().float().exp()

    @torch.no_grad()
    def init_vl_experts(self, source: str) -> None:
        """Copies each layer's text or image expert ("text", "imag") into its VL expert."""
        for block in self.transformer.blocks[self.config.vlffn_start_layer_index :]:
            for part in ("mlp", "norm2"):
                block.get_submodule(f"{part}_vl").load_state_dict(block.get_submodule(f"{part}_{source}").state_dict())


def normalized(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels to [-1, 1]; a floating-point image is taken as already normalised."""
    return normalize(image, *PIXELS, dtype)
