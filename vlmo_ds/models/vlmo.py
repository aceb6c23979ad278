"""VLMo: the MultiWayTransformer, its embeddings and its heads; one training step as the engine runs it.

Everything goes through `VLMo.forward`, because under ZeRO-3 the parameters that VLMo holds itself (the relative
position table, the logit scales) are there only inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ds.config import ModelConfig
from vlmo_ds.distributed.collector import Collector
from vlmo_ds.models.heads import ITCHead, ITMHead, MIMHead, MLMHead, Pooler, TextEmbeddings
from vlmo_ds.models.multiway import Encoded, MultiWayTransformer, Stream
from vlmo_ds.models.position import num_distances
from vlmo_ds.objectives.itc import gather_features, itc_loss
from vlmo_ds.objectives.itm import itm_loss, mine_negatives
from vlmo_ds.objectives.mim import NormalizedPixels, mim_loss
from vlmo_ds.objectives.mlm import mlm_loss

IMAGE_MEAN = IMAGE_STD = 0.5  # VLMo's normalisation to [-1, 1]

Batch = Mapping[str, Tensor]


class StepOutput(NamedTuple):
    """What one forward pass gives back (a tuple, in which DeepSpeed finds the tensors).

    loss: this rank's weighted sum, to be averaged over ranks; losses: the same per task, weights included, gradients
    attached; ratios: (numerator, denominator) of this rank, to be summed over ranks; values: equal on all ranks.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    ratios: dict[str, tuple[Tensor, Tensor]]
    values: dict[str, Tensor]


def init_weights(module: nn.Module, std: float) -> None:
    """Truncated normal for linear layers and embeddings, zeros for biases and the padding word."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class VLMo(nn.Module):
    """VLMo (arXiv:2111.02358) with the heads that its tasks need.

    tasks: task name -> loss weight. Names: mim, textmlm, mlm, itc, itm.
    Parameter names and shapes are those of the official checkpoints.
    """

    def __init__(self, config: ModelConfig, tasks: Mapping[str, float], collector: Collector | None = None):
        super().__init__()
        self.config = config
        self.tasks = dict(tasks)
        self.collector = collector or Collector()
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
            with_mask_token="mim" in tasks,
            attention=config.attention,
            checkpoint_every=config.activation_checkpoint_every,
        )
        self.text_embeddings = TextEmbeddings(
            config.vocab_size,
            dim,
            config.max_text_len,
            not config.need_relative_position_embed,
            config.text_dropout_rate,
        )
        self.token_type_embeddings = nn.Embedding(2, dim)
        self.pooler = Pooler(dim)
        if config.need_relative_position_embed:
            rows = num_distances(config.image_size // config.patch_size, config.max_text_len_of_initckpt)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, config.num_heads * config.depth))
        else:
            self.relative_position_bias_table = None
        if "mim" in tasks:
            self.mim_target = NormalizedPixels(config.patch_size)
            self.mim_score = MIMHead(dim, self.mim_target.dim)
        if "mlm" in tasks or "textmlm" in tasks:
            self.mlm_score = MLMHead(dim, config.vocab_size)
        if "itm" in tasks:
            self.itm_score = ITMHead(dim)
        if "itc" in tasks:
            self.itc_text_proj, self.itc_image_proj = ITCHead(dim), ITCHead(dim)
            self.itc_vl_text_proj, self.itc_vl_image_proj = ITCHead(dim), ITCHead(dim)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            self.logit_vl_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.apply(partial(init_weights, std=config.init_std))
        for token in (self.transformer.cls_token, self.transformer.mask_token, self.transformer.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=config.init_std)

    def forward(self, batch: Batch, call: str = "step"):
        """Runs one of: step (all tasks, gives StepOutput), encode_image, encode_text, match (for evaluation)."""
        return {
            "step": self.step,
            "encode_image": self.encode_image,
            "encode_text": self.encode_text,
            "match": self.match,
        }[call](batch)

    # ---- one training step: two walks of the block stack at most ----

    def step(self, batch: Batch) -> StepOutput:
        """Wave 1 encodes all that needs no mined negatives, wave 2 the mined pairs; then the weighted losses.

        batch: image [B, 3, S, S] uint8 (or float, already normalised), text_ids, text_masks, text_ids_mlm,
        text_labels_mlm [B, L] int64, image_id, sample_id [B] int64, image_mask [B, P] bool (mim),
        negative_seed 0-d int64 (itm): as far as the tasks need them.
        """
        tasks, streams = self.tasks, {}
        texts: dict[str, Tensor] = {}
        if "mlm" in tasks or "textmlm" in tasks:
            texts["masked"] = batch["text_ids_mlm"]
        if "itc" in tasks or "itm" in tasks:
            texts["clean"] = batch["text_ids"]
        images = normalize(batch["image"], self.transformer.cls_token.dtype) if self.needs_image else None
        types = self.token_types()
        text = self.embed_texts(texts, types)
        mask = batch.get("text_masks")
        rows = torch.arange(len(images), device=images.device) if images is not None else None
        joint = [name for name, task in (("masked", "mlm"), ("clean", "itm")) if task in tasks]
        if joint:  # pairs of equal shape are one stream
            streams["joint"] = Stream(
                torch.cat([text[name] for name in joint]), mask.repeat(len(joint), 1), rows.repeat(len(joint))
            )
        if "textmlm" in tasks:
            streams["textmlm"] = Stream(text["masked"], mask)
        if "itc" in tasks:
            streams["text"] = Stream(text["clean"], mask, vl_twin=True)
            streams["image"] = Stream(image_rows_B=rows, vl_twin=True)
        if "mim" in tasks:
            streams["mim"] = Stream(image_rows_B=rows)
        wave1 = self.encode(streams, images, types, batch["image_mask"] if "mim" in tasks else None)

        out = StepOutput(torch.zeros(()), {}, {}, {})
        if "mim" in tasks:
            out_mim = mim_loss(
                wave1["mim"].tokens_BLD, images, batch["image_mask"], self.mim_score, self.mim_target, self.collector
            )
            self.record(out, "mim", out_mim)
        if "textmlm" in tasks:
            labels = batch["text_labels_mlm"]
            self.record(out, "textmlm", mlm_loss(wave1["textmlm"].tokens_BLD, labels, self.mlm_score, self.collector))
        if joint:
            pairs = dict(zip(joint, wave1["joint"].tokens_BLD.chunk(len(joint)), strict=True))
        if "mlm" in tasks:
            labels = batch["text_labels_mlm"]
            tokens = pairs["masked"][:, : labels.shape[1]]
            self.record(out, "mlm", mlm_loss(tokens, labels, self.mlm_score, self.collector))
        if "itc" in tasks:
            feature = self.itc_features(wave1["image"], wave1["text"])
            main = gather_features(feature["image"], feature["text"], self.logit_scale, self.collector)
            twin = gather_features(feature["vl_image"], feature["vl_text"], self.logit_vl_scale, self.collector)
            loss, ratios = itc_loss(main, self.collector)
            vl_loss, vl_ratios = itc_loss(twin, self.collector)
            ratios |= {f"vl_{name}": ratio for name, ratio in vl_ratios.items()}
            self.record(out, "itc", ((loss + vl_loss) / 2, ratios))
            out.values.update({"itc/logit_scale": main.scale.detach(), "itc/vl_logit_scale": twin.scale.detach()})
        if "itm" in tasks:
            cls = torch.cat((pairs["clean"][:, 0], self.mined_pairs(batch, images, text["clean"], types, main)))
            self.record(out, "itm", itm_loss(self.itm_score(self.pooler(cls)), self.collector))
        return out._replace(loss=sum(out.losses.values()))

    @property
    def needs_image(self) -> bool:
        return not self.tasks.keys() <= {"textmlm"}

    def record(self, out: StepOutput, task: str, result: tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]) -> None:
        loss, ratios = result
        out.losses[task] = loss * self.tasks[task]
        out.ratios.update({f"{task}/{name}": ratio for name, ratio in ratios.items()})

    def mined_pairs(self, batch: Batch, images: Tensor, text_BLD: Tensor, types_2D: Tensor, contrast) -> Tensor:
        """Wave 2: class tokens of (text, wrong image), then of (wrong text, image), [2B, D]."""
        negatives = mine_negatives(
            contrast, batch["sample_id"], batch["image_id"], int(batch["negative_seed"]), self.collector
        )
        if "negative_image_index" in batch:  # recorded negatives, for parity checks
            negatives.image_B, negatives.text_B = batch["negative_image_index"], batch["negative_text_index"]
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
            torch.cat((padded_text_BLD, wrong_text_BLD)), mask, torch.arange(2 * len(ids), device=mask.device)
        )
        pixels = torch.cat((normalize(wrong_image, images.dtype), images))
        return self.encode({"pairs": pairs}, pixels, types_2D)["pairs"].tokens_BLD[:, 0]

    # ---- encodings ----

    def encode(
        self,
        streams: Mapping[str, Stream],
        images: Tensor | None,
        types_2D: Tensor,
        image_mask: Tensor | None = None,
    ) -> dict[str, Encoded]:
        """Walks the block stack once for all streams. images: normalised, what the streams' image_rows_B point to."""
        encoded = self.transformer(
            list(streams.values()), self.relative_position_bias_table, images, types_2D[1], image_mask
        )
        return dict(zip(streams, encoded, strict=True))

    def token_types(self) -> Tensor:
        """The embeddings that mark text (0) and image (1) tokens, [2, D]: read once a step, for both walks."""
        return self.token_type_embeddings(torch.arange(2, device=self.token_type_embeddings.weight.device))

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
            features["vl_image"] = self.itc_vl_image_proj(image.twin_BLD[:, 0])
        if text is not None:
            features["text"] = self.itc_text_proj(text.tokens_BLD[:, 0])
            features["vl_text"] = self.itc_vl_text_proj(text.twin_BLD[:, 0])
        return features

    # ---- evaluation ----

    def encode_image(self, batch: Batch) -> dict[str, Tensor]:
        """image [B, 3, S, S] -> contrastive features image and vl_image, [B, D]."""
        images = normalize(batch["image"], self.transformer.cls_token.dtype)
        stream = Stream(image_rows_B=torch.arange(len(images), device=images.device), vl_twin=True)
        return self.itc_features(self.encode({"image": stream}, images, self.token_types())["image"], None)

    def encode_text(self, batch: Batch) -> dict[str, Tensor]:
        """text_ids, text_masks [B, L] -> contrastive features text and vl_text, [B, D]."""
        types = self.token_types()
        text = self.embed_texts({"text": batch["text_ids"]}, types)["text"]
        stream = Stream(text, batch["text_masks"], vl_twin=True)
        return self.itc_features(None, self.encode({"text": stream}, None, types)["text"])

    def match(self, batch: Batch) -> Tensor:
        """image, text_ids, text_masks of B pairs -> [B] log-odds that they match."""
        images = normalize(batch["image"], self.transformer.cls_token.dtype)
        types = self.token_types()
        text = self.embed_texts({"text": batch["text_ids"]}, types)["text"]
        stream = Stream(text, batch["text_masks"], torch.arange(len(images), device=images.device))
        pooled = self.pooler(self.encode({"pair": stream}, images, types)["pair"].tokens_BLD[:, 0])
        logits = self.itm_score(pooled).float()
        return logits[:, 1] - logits[:, 0]

    @torch.no_grad()
    def init_vl_experts(self, source: str) -> None:
        """Copies each layer's text or image expert ("text", "imag") into its VL expert."""
        for block in self.transformer.blocks[self.config.vlffn_start_layer_index :]:
            block.mlp_vl.load_state_dict(getattr(block, f"mlp_{source}").state_dict())
            block.norm2_vl.load_state_dict(getattr(block, f"norm2_{source}").state_dict())


def normalize(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels to [-1, 1]; a floating-point image is taken as already normalised."""
    if image.dtype == torch.uint8:
        image = (image.float() / 255 - IMAGE_MEAN) / IMAGE_STD
    return image.to(dtype)
